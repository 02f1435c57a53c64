"""The wish to stop: noted on signals, acted on when all ranks agree."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from nemotron_launch.trainer.signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("signo", STOP_SIGNALS)
def test_a_signal_stops_at_the_next_agreement(signo):
    with StopRequest() as request:
        assert not request.agree(False, 1)
        os.kill(os.getpid(), signo)
        assert request.signal_name == signo.name
        assert request.agree(False, 2)
        assert request.agree(False, 3)
        assert request.stop_step == 2


def test_another_reason_stops_too():
    with StopRequest() as request:
        assert request.agree(True, 5)
        assert (request.stop_step, request.signal_name) == (5, None)


def test_a_rank_without_the_signal_stops_with_the_others():
    asked = []

    def another_rank_wants_to(flag: bool) -> bool:
        asked.append(flag)
        return True

    with StopRequest() as request:
        request.over(another_rank_wants_to)
        assert request.agree(False, 3)
    assert asked == [False]


def test_a_rank_with_the_signal_goes_on_until_the_collective_says_so():
    # Its own flag alone would have it leave the others in the middle of their next collective.
    answers = iter([False, True])
    with StopRequest(lambda flag: next(answers)) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert not request.agree(False, 1)
        assert request.agree(False, 2)


def test_a_second_interrupt_interrupts():
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_former_handlers_come_back():
    before = [signal.getsignal(signo) for signo in STOP_SIGNALS]
    with StopRequest():
        pass
    assert [signal.getsignal(signo) for signo in STOP_SIGNALS] == before


def test_usr2_prints_the_stacks_and_training_goes_on():
    script = textwrap.dedent("""
        import os, signal, sys
        from nemotron_launch.trainer.signals import StopRequest
        def a_function_in_which_it_hangs():
            os.kill(os.getpid(), signal.SIGUSR2)
        with StopRequest() as request:
            a_function_in_which_it_hangs()
            assert not request.agree(False, 1)
        assert "torch" not in sys.modules
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "a_function_in_which_it_hangs" in done.stderr


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path):
    pytest.importorskip("torch")
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
            import os, signal, sys, time
            from pathlib import Path
            from nemotron_launch.trainer.signals import StopRequest
            request = StopRequest()
            import torch
            from torch import distributed
            distributed.init_process_group("gloo")
            rank = distributed.get_rank()

            def any_rank(flag):
                wish = torch.tensor(float(flag))
                distributed.all_reduce(wish, distributed.ReduceOp.MAX)
                return bool(wish)

            request.over(any_rank)
            for step in range(1, 10_000):
                time.sleep(0.001 * rank)  # the ranks are not in step
                if rank == 1 and step == 50:
                    os.kill(os.getpid(), signal.SIGUSR1)
                if request.agree(False, step):
                    break
            Path({str(tmp_path)!r}, f"stopped-{{rank}}").write_text(f"{{step}} {{request.signal_name}}")
            distributed.destroy_process_group()
            sys.exit(85)
        """)
    )
    command = [sys.executable, "-m", "nemotron_launch.trainer.spawn", "--procs", "2", "--", str(script)]
    assert subprocess.run(command, check=False, timeout=60).returncode == 85
    assert [(tmp_path / f"stopped-{rank}").read_text() for rank in (0, 1)] == ["50 None", "50 SIGUSR1"]
