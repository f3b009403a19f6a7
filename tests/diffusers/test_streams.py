"""Which stream a call belongs to, from timesteps, prompts and shapes, without a UNet."""

import itertools

import pytest
import torch

from todo_attn.diffusers.streams import Streams

INPUTS = (torch.Size((1, 4, 8, 8)), torch.float32, torch.device("cpu"))
OTHER = (torch.Size((2, 4, 8, 8)), torch.float32, torch.device("cpu"))


class Calls:
    """Calls in a row; ``calls(...)`` gives the number of the stream, and "new" or the index in its run."""

    def __init__(self):
        self.said = []
        self.streams = Streams(lambda key, what: self.said.append(key) if key not in self.said else None)
        self.numbers, self.count = {}, itertools.count()

    def __call__(self, timestep, prompt=None, inputs=INPUTS, end=True):
        stream = self.streams.of(timestep, prompt, inputs)
        if id(stream) not in self.numbers:
            self.numbers[id(stream)] = (next(self.count), stream)  # held, so that no id comes again
        number = self.numbers[id(stream)][0]
        stream.running = not end
        return (number, "new" if stream.fresh else stream.index)


@pytest.fixture
def calls():
    return Calls()


def steps(n):
    return torch.arange(10 * n, 0, -10)


def prompts(n):
    return [torch.zeros(1, 5, 8) for _ in range(n)]


def test_one_call_a_step(calls):
    (prompt,) = prompts(1)
    assert [calls(t, prompt) for t in steps(4)] == [(0, "new"), (0, 1), (0, 2), (0, 3)]
    assert calls.said == []


def test_guidance_in_two_calls_a_step(calls):
    cond, uncond = prompts(2)
    seen = [calls(t, prompt) for t in steps(3) for prompt in (cond, uncond)]
    assert seen == [(0, "new"), (1, "new"), (0, 1), (1, 1), (0, 2), (1, 2)]


def test_prompts_that_are_slices_of_one_tensor(calls):
    """Computed again in every step, as a loop with little memory does."""
    both = torch.zeros(2, 5, 8)
    seen = [calls(t, part) for t in steps(3) for part in both.chunk(2)]
    assert seen == [(0, "new"), (1, "new"), (0, 1), (1, 1), (0, 2), (1, 2)]


def test_the_order_of_the_calls_of_a_step_does_not_matter(calls):
    cond, uncond = prompts(2)
    timesteps = steps(3)
    assert [calls(timesteps[0], p)[0] for p in (cond, uncond)] == [0, 1]
    assert [calls(timesteps[1], p) for p in (uncond, cond)] == [(1, 1), (0, 1)]


def test_guidance_that_joins_late_and_leaves(calls):
    """Both streams count the steps alike, so that their full calls are at the same steps."""
    cond, uncond = prompts(2)
    timesteps = steps(6)
    assert [calls(t, cond) for t in timesteps[:2]] == [(0, "new"), (0, 1)]
    assert calls(timesteps[2], uncond) == (1, "new")
    assert calls(timesteps[2], cond) == (0, 2)
    assert calls(timesteps[3], uncond) == (1, 3)
    assert [calls(t, cond) for t in timesteps[3:]] == [(0, 3), (0, 4), (0, 5)]


def test_requests_that_take_turns(calls):
    a, b = prompts(2)
    first, second = steps(4), steps(3)
    assert calls(first[0], a) == (0, "new")
    assert calls(first[1], a) == (0, 1)
    assert calls(second[0], b) == (1, "new")
    assert calls(first[2], a) == (0, 2)
    assert calls(second[1], b) == (1, 1)
    assert calls(second[2], b) == (1, 2)
    assert calls(first[3], a) == (0, 3)


def test_the_same_prompt_at_the_same_step_of_other_timesteps(calls):
    """Another scheduler, or the same one set again."""
    (prompt,) = prompts(1)
    first, second = steps(4), steps(4)
    assert calls(first[0], prompt) == (0, "new")
    assert calls(second[1], prompt) == (1, "new")
    assert calls(first[1], prompt) == (0, 1)


def test_timesteps_in_memory_that_was_given_back(calls):
    """They are held, so that no later tensor gets their memory."""
    (prompt,) = prompts(1)
    for _ in range(20):
        assert calls(steps(4)[1], prompt)[1] == "new"


def test_timesteps_made_anew_for_every_call(calls):
    """As by ``timesteps.float()[i]`` in a loop. What is left behind is not kept."""
    (prompt,) = prompts(1)
    assert {calls(steps(9).float()[i], prompt)[1] for i in range(9)} == {"new"}
    assert calls.said == ["timesteps"]
    assert len(calls.streams) <= 3


def test_a_run_that_was_cut_short(calls):
    (prompt,) = prompts(1)
    timesteps = steps(4)
    assert [calls(t, prompt) for t in timesteps[:3]] == [(0, "new"), (0, 1), (0, 2)]
    assert [calls(t, prompt) for t in timesteps] == [(0, "new"), (0, 1), (0, 2), (0, 3)]


def test_cut_short_after_its_first_call(calls):
    """A second call at a step is a restart or another image: which of the two the next continues is not known."""
    (prompt,) = prompts(1)
    timesteps = steps(4)
    assert calls(timesteps[0], prompt) == (0, "new")
    assert [calls(t, prompt)[1] for t in timesteps] == ["new", "new", 2, 3]
    assert calls.said == []  # a call more is computed in full, no more than that


def test_more_calls_in_a_step_with_the_same_prompt(calls):
    """Perturbed ones, or views of one image."""
    (prompt,) = prompts(1)
    assert {calls(t, prompt)[1] for t in steps(4) for _ in range(2)} == {"new"}
    assert calls.said == ["repeated"]


def test_a_call_of_another_shape_in_each_step(calls):
    """Self-attention guidance: a second call with half the batch."""
    (prompt,) = prompts(1)
    seen = [calls(t, prompt, inputs) for t in steps(3) for inputs in (OTHER, INPUTS)]
    assert seen == [(0, "new"), (1, "new"), (0, 1), (1, 1), (0, 2), (1, 2)]


def test_a_step_that_was_left_out(calls):
    """What is kept is one step older than the schedule assumes."""
    (prompt,) = prompts(1)
    timesteps = steps(5)
    assert [calls(timesteps[i], prompt) for i in (0, 1, 3, 4)] == [(0, "new"), (0, 1), (0, "new"), (0, 4)]


def test_a_call_that_never_ended(calls):
    (prompt,) = prompts(1)
    timesteps = steps(4)
    assert calls(timesteps[0], prompt) == (0, "new")
    assert calls(timesteps[1], prompt, end=False) == (0, 1)
    assert calls(timesteps[1], prompt) == (0, "new")  # tried again
    assert calls(timesteps[2], prompt) == (0, 2)
    assert calls(timesteps[3], prompt, end=False) == (0, 3)
    assert calls(timesteps[0], prompt) == (0, "new")
    assert calls.said == []


def test_prompts_made_anew_for_every_call(calls):
    assert [calls(t, prompt)[1] for t, prompt in zip(steps(3), prompts(3), strict=True)] == ["new"] * 3
    assert calls.said == ["prompt"]


@pytest.mark.parametrize("form", [int, float, lambda t: t.clone(), lambda t: t[None].clone()])
def test_timesteps_that_are_no_elements_of_a_tensor(calls, form):
    """An interrupted run and another image that starts at a lower timestep would look alike."""
    (prompt,) = prompts(1)
    assert {calls(form(t), prompt)[1] for t in steps(5)} == {"new"}
    assert len(calls.streams) == 0


def test_every_second_element_of_a_longer_tensor(calls):
    (prompt,) = prompts(1)
    assert {calls(t, prompt)[1] for t in steps(10)[::2]} == {"new"}
    assert calls.said == ["gaps"]
    assert [calls(t, prompt)[1] for t in steps(10)[::2].contiguous()] == ["new", 1, 2, 3, 4]


def test_runs_of_one_step(calls):
    (prompt,) = prompts(1)
    assert {calls(999, prompt)[1] for _ in range(4)} == {"new"}
    assert calls.said == []


def test_more_runs_than_are_kept(calls):
    """The warning names this reason, and not other prompts."""
    runs = [(steps(3), prompt) for prompt in prompts(17)]
    for i in range(2):
        for timesteps, prompt in runs:
            calls(timesteps[i], prompt)
    assert calls.said == ["many"]


def test_without_a_prompt(calls):
    assert [calls(t) for t in steps(3)] == [(0, "new"), (0, 1), (0, 2)]


def test_streams_that_nobody_finishes_are_forgotten(calls):
    for _ in range(50):
        calls(steps(4)[0], *prompts(1))
    assert len(calls.streams) <= 16


class Pipe:
    pass


def test_a_pipeline_that_starts_again_has_given_up_its_last_run(calls):
    """All streams of the pipeline; those of another pipeline stay."""
    pipe, other = Pipe(), Pipe()
    cond, uncond = prompts(2)

    def start(pipe):
        timesteps = steps(4)
        for prompt in (cond, uncond):
            calls.streams.give_to(calls.streams.of(timesteps[0], prompt, INPUTS), pipe)

    start(other)
    for _ in range(3):
        start(pipe)
        assert len(calls.streams) == 4
    del pipe
    start(other)
    assert len(calls.streams) == 4
