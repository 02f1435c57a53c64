"""The environment nemo_gym: the wire format, and servers that die, hang, are busy or answer nonsense."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from gym_server import Gym, right_or_wrong, text_of

from nemotron_launch.errors import UserError
from nemotron_launch.trainer.environments import Rollout
from nemotron_launch.trainer.environments.nemo_gym import response_of


@pytest.fixture
def gym() -> Iterator[Callable[..., Gym]]:
    """Starts stand-ins; each instance as gym(name=behaviour) says."""
    made: list[Gym] = []

    def start(**behave: Any) -> Gym:
        made.append(Gym(behave))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def at(opened) -> Callable[..., Any]:
    """Environments that ask a stand-in: at(gym, timeout=1)."""

    def at(gym: Gym, **section: Any) -> Any:
        quick = {"server": gym.address, "timeout": 60, "retries": 1, "ready_timeout": 60, "concurrency": 8, **section}
        return opened(should_use_nemo_gym=True, nemo_gym=quick)

    return at


def row(agent: str, answer: str = "18", **more: Any) -> dict[str, Any]:
    asked = {"input": [{"role": "user", "content": "9 + 9?"}]}
    ref = {"type": "responses_api_agents", "name": f"{agent}_simple_agent"}
    return {"responses_create_params": asked, "agent_ref": ref, "expected_answer": answer, **more}


def group(agent: str, *texts: str, size: int = 0, **more: Any) -> list[Rollout]:
    texts = texts or ("18",) * size
    return [Rollout([], text, row(agent, **more), key=(1, 1, 7, i)) for i, text in enumerate(texts)]


def test_servers_score_their_own_rows(gym, at):
    servers = gym(mcqa=right_or_wrong, math=right_or_wrong)
    environments = at(servers)
    scores = environments.score([group("mcqa", "18", "19"), group("math", "19", "18", "<think>19</think>18")])
    assert [[score.reward for score in one] for one in scores] == [[1, 0], [0, 1, 1]]
    assert all(not score.error and not score.lost and score.seconds > 0 for one in scores for score in one)
    visited = [(name, path) for name, path, _ in servers.visits]
    assert visited.count(("mcqa", "/seed_session")) == visited.count(("mcqa", "/verify")) == 2
    seeds = [body for _, path, body in servers.visits if path == "/seed_session"]
    assert all("response" not in body and body["expected_answer"] == "18" for body in seeds)


def test_an_answer_is_a_response_with_reasoning_text_and_calls():
    tools = [{"type": "function", "name": "add", "parameters": {}}]
    asked = {"input": "9 + 9?", "tools": tools, "parallel_tool_calls": False}
    text = '<think>adding</think>I add.<tool_call>{"name": "add", "arguments": {"a": 9}}</tool_call>'
    response = response_of(Rollout([], text, {"responses_create_params": asked}, truncated=True, key=(1, 2)))
    reasoning, message, call = response["output"]
    assert reasoning["summary"] == [{"type": "summary_text", "text": "adding"}]
    assert message["content"] == [{"type": "output_text", "text": "I add.", "annotations": []}]
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "add", '{"a": 9}')
    assert (response["tools"], response["parallel_tool_calls"]) == (tools, False)
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}


def test_rows_that_a_server_cannot_read_are_named_before_the_first_rollout(gym, at):
    environments = at(gym(mcqa=right_or_wrong))
    without_field, without_agent, misspelt, unknown = row("mcqa"), row("mcqa"), row("mcqa"), row("mcq")
    del without_field["expected_answer"]
    without_agent["agent_ref"] = {"type": "responses_api_agents"}
    misspelt["responses_create_params"]["tool"] = []
    shapeless = {**row("mcqa"), "responses_create_params": None}
    rows = [row("mcqa"), without_field, without_agent, misspelt, unknown, shapeless]
    with pytest.raises(UserError) as refused:
        environments.check(rows, [f"rows.jsonl:{n}" for n in range(1, 7)])
    said = str(refused.value)
    assert said.startswith("error: rows.jsonl:2: 5 of 6 rows cannot be scored")
    for line in (
        "(expected_answer: Field required) (environment nemo_gym): rows.jsonl:2",
        "missing key agent_ref.name (environment nemo_gym): rows.jsonl:3",
        "unknown key responses_create_params.tool; did you mean tools? (environment nemo_gym): rows.jsonl:4",
        "agent_ref.name is mcq_simple_agent, which no server is for; did you mean mcqa_simple_agent?",
        "missing key responses_create_params (environment nemo_gym): rows.jsonl:6",
    ):
        assert line in said


def test_a_server_that_fails_now_and_then_is_asked_again(gym, at):
    answers = iter([(500, {}), (200, b"<html>")])
    lock = threading.Lock()

    def moody(body: dict[str, Any]) -> tuple[int, Any]:
        with lock:
            return next(answers, None) or right_or_wrong(body)

    (scores,) = at(gym(moody=moody), retries=2, concurrency=1).score([group("moody", "18", "19")])
    assert [(score.reward, score.lost) for score in scores] == [(1, False), (0, False)]


NONSENSE = {
    "no JSON": b"<html>",
    "a list": [1.0],
    "no reward": {"score": 1},
    "a reward in words": {"reward": "high"},
    "a reward that is no number": b'{"reward": NaN}',
    "infinity": b'{"reward": 1e999}',
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_a_server_that_answers_nonsense_costs_its_rows_only(gym, at, kind):
    servers = gym(mad=lambda body: (200, NONSENSE[kind]), well=right_or_wrong)
    mad, well = at(servers, retries=0).score([group("mad", size=2), group("well", size=2)])
    assert all(score.lost and score.reward == 0 and "mad" in score.error for score in mad)
    assert [(score.reward, score.lost) for score in well] == [(1, False)] * 2


def test_a_server_that_dies_costs_its_rows_only(gym, at):
    servers = gym(mortal=right_or_wrong, well=right_or_wrong)
    environments = at(servers, retries=0)
    environments.check([row("mortal"), row("well")], ["a:1", "a:2"])
    servers.stop("mortal")
    dead, well = environments.score([group("mortal", size=3), group("well", size=3)])
    assert all(score.lost for score in dead)
    assert [score.reward for score in well] == [1, 1, 1]


def test_a_server_that_hangs_costs_its_rows_and_no_more_than_the_timeout(gym, at):
    servers = gym(hung=lambda body: (servers.released.wait(60), (200, {}))[1], well=right_or_wrong)
    environments = at(servers, timeout=0.5, retries=0)
    started = time.monotonic()
    hung, well = environments.score([group("hung", size=24), group("well", size=2)])
    assert all(score.lost for score in hung)
    assert [score.reward for score in well] == [1, 1]
    # 24 rows at 8 a time would wait 3 × 0.5 s; after five failures the server counts as down, and the rest is not sent.
    assert len([path for name, path, _ in servers.visits if (name, path) == ("hung", "/verify")]) < 24
    assert time.monotonic() - started < 30
    assert "hung is down" in {score.error.removeprefix("hung_simple_agent: ") for score in hung}


def test_a_reply_that_drips_ends_with_the_timeout(gym, at):
    def drips(body: dict[str, Any]) -> tuple[int, Any]:
        raise AssertionError("replaced")

    servers = gym(drip=drips)
    handler = next(server for server in servers._servers if server.instance == "drip").RequestHandlerClass

    def reply(self, status, body, *, cookie=""):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        while not servers.released.wait(0.05):
            self.wfile.write(b" ")
            self.wfile.flush()

    handler.reply = reply
    (scores,) = at(servers, timeout=0.5, retries=0).score([group("drip", size=1)])
    assert scores[0].lost
    assert "took longer than 0.5 s" in scores[0].error


def test_a_busy_server_gets_fewer_requests_at_once(gym, at):
    together, lock, now, most = threading.Barrier(8, timeout=60), threading.Lock(), [0], []
    first = iter(range(8))

    def busy(body: dict[str, Any]) -> tuple[int, Any]:
        with lock:
            refused = next(first, None) is not None
        if refused:
            together.wait()
            return 503, {}
        with lock:
            now[0] += 1
            most.append(now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1
        return right_or_wrong(body)

    (scores,) = at(gym(busy=busy), retries=2, concurrency=8).score([group("busy", size=24)])
    assert [score.reward for score in scores] == [1] * 24
    # Halved eight times, then one more for each as many answers as there are places: 1, 2, 2, 3, 3, 3, …
    assert all(at_once <= place for at_once, place in zip(most, (1, 2, 2, 3, 3, 3), strict=False))


def test_concurrency_is_limited_and_order_kept(gym, at):
    def slow(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.01)
        return 200, {"reward": float(text_of(body))}

    servers = gym(slow=slow)
    (scores,) = at(servers, concurrency=3).score([group("slow", *[str(n) for n in range(30)])])
    assert [score.reward for score in scores] == list(range(30))
    assert 1 < servers.most_at_once <= 3


def test_masked_samples_are_lost_and_parts_of_rewards_are_kept(gym, at):
    servers = gym(
        masks=lambda body: (200, {"reward": 1, "mask_sample": True}),
        parts=lambda body: (200, {"reward": 0.75, "reward_components": {"a": 0.25, "b": 0.5, "c": "x"}}),
    )
    (masked,), (parts,) = at(servers).score([group("masks", size=1), group("parts", size=1)])
    assert masked.lost
    assert (parts.reward, parts.components) == (0.75, {"a": 0.25, "b": 0.5})


def test_servers_that_get_ready_late_are_waited_for(gym, at):
    servers = gym(late=right_or_wrong)
    port = servers.config["late"]["resources_servers"]["late"].pop("port")
    timer = threading.Timer(0.5, lambda: servers.config["late"]["resources_servers"]["late"].update(port=port))
    timer.start()
    at(servers).check([row("late")], ["a:1"])
    timer.join()


def test_servers_that_never_get_ready_are_named(gym, at):
    servers = gym(never=right_or_wrong)
    del servers.config["never"]["resources_servers"]["never"]["port"]
    with pytest.raises(UserError, match=r"never_simple_agent did not get ready in 0\.3 s"):
        at(servers, ready_timeout=0.3).check([row("never")], ["a:1"])


def test_a_head_server_that_is_not_there_is_named(opened, gym):
    servers = gym()
    servers.stop("head")
    environments = opened(should_use_nemo_gym=True, nemo_gym={"server": servers.address, "ready_timeout": 0.3})
    with pytest.raises(UserError, match="env.nemo_gym.server: NeMo Gym's head server at .* is not ready"):
        environments.check([row("mcqa")], ["a:1"])


def test_servers_without_a_head_are_found_by_their_config(opened, gym):
    servers = gym(mcqa=right_or_wrong)
    section = {"server": None, "ready_timeout": 30, "mcqa": servers.config["mcqa"]}
    environments = opened(should_use_nemo_gym=True, nemo_gym=section)
    environments.check([row("mcqa")], ["a:1"])
    assert environments.score([group("mcqa", "18")])[0][0].reward == 1


def test_an_interrupt_does_not_wait_for_a_server_that_hangs(gym, at):
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    servers = gym(hung=lambda body: (servers.released.wait(60), (200, {}))[1])
    environments = at(servers, timeout=2, retries=5, concurrency=1)
    before = signal.signal(signal.SIGALRM, interrupt)
    started = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(Interrupted):
            environments.score([group("hung", size=20)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 20
