"""References to images: what enroot is given, and what the imported file is called."""

from __future__ import annotations

import pytest

from nemotron_launch.errors import UserError
from nemotron_launch.images import parse


@pytest.mark.parametrize(
    ("reference", "uri", "squash"),
    [
        # enroot's form sets the registry apart: docker://[USER@][REGISTRY#]IMAGE[:TAG].
        ("nvcr.io/nvidia/x:v0.6.0", "docker://nvcr.io#nvidia/x:v0.6.0", "nvcr.io+nvidia+x+v0.6.0.sqsh"),
        ("docker://nvcr.io/nvidia/x:1", "docker://nvcr.io#nvidia/x:1", "nvcr.io+nvidia+x+1.sqsh"),
        ("docker://nvcr.io#nvidia/x:1", "docker://nvcr.io#nvidia/x:1", "nvcr.io+nvidia+x+1.sqsh"),
        ("localhost:5000/a/b", "docker://localhost:5000#a/b", "localhost+5000+a+b.sqsh"),
        ("nvidia/cuda:12.6.0-base", "docker://nvidia/cuda:12.6.0-base", "nvidia+cuda+12.6.0-base.sqsh"),
        ("ubuntu", "docker://ubuntu", "ubuntu.sqsh"),
        ("podman://x:1", "podman://x:1", "podman+x+1.sqsh"),
        ("docker-archive:/data/x.tar", "docker-archive:///data/x.tar", "docker-archive+data+x.tar.sqsh"),
    ],
)
def test_a_reference_takes_enroots_form(reference: str, uri: str, squash: str) -> None:
    image = parse(reference)
    assert (image.uri, image.squash_name, image.path) == (uri, squash, "")


def test_a_path_is_used_as_it_is() -> None:
    image = parse("/lustre/images/my image.sqsh")
    assert (image.uri, image.path) == ("", "/lustre/images/my image.sqsh")


def test_a_long_reference_gets_a_file_name_that_fits_and_stays_its_own() -> None:
    names = {parse(f"nvcr.io/{'x' * 400}:{tag}").squash_name for tag in "ab"}
    assert len(names) == 2 and max(map(len, names)) <= 255


@pytest.mark.parametrize("reference", ["s3://x/y", "images/x.sqsh", "a b", "-x", "docker-archive:x.tar", "$(x)"])
def test_what_enroot_cannot_import_is_refused(reference: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(reference, "image")
    assert caught.value.where == "image"
