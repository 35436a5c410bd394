"""The registry: who is asked, in which order, what is remembered, and that nobody else asks."""

from __future__ import annotations

import ast
import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcomp import Stack
from kvcomp.attention import Part, Tokens
from kvcomp.kernels import backends, dispatch, select
from kvcomp.kernels.contract import MOST_ROWS, Backend, Case
from kvcomp.kernels.cpu.backend import C
from kvcomp.kernels.received import received
from kvcomp.kernels.reference.backend import Reference
from kvcomp.kernels.triton_backend import Triton
from kvcomp.layout import PageLayout
from kvcomp.segments import SideLayout, memo
from kvcomp.stages import Codec, PageShape

ROOT = Path(__file__).parents[2]
HOST = torch.device("cpu")
OPERATIONS = sorted(set(Backend.__annotations__) - {"name"})
NO_KERNEL = {"write", "append", "advance", "shift_windows"}  # of the reference: codecs and buffers do these themselves


def built(spec: str) -> tuple[Codec, PageLayout]:
    plan = Stack.parse(spec).plan(0, 1)
    return plan.build(PageShape(plan.page_size, 64, 64, 1, torch.float32, HOST, 0))


@pytest.mark.parametrize("backend", [C(), Triton(anywhere=True)], ids=lambda backend: backend.name)
def test_what_the_reference_has_defaults_for_no_backend_requires(backend: Backend) -> None:
    """Of operations whose arguments go from the caller to a backend as they are."""
    for operation in ("received", "runs", "shares", "choose", "largest"):
        specified, own = getattr(Reference, operation, None), getattr(backend, operation, None)
        if specified is None or own is None:
            continue
        defaults = {p.name: p.default for p in signature(specified).parameters.values()}
        for p in signature(own).parameters.values():
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                continue
            assert p.default == defaults.get(p.name, p.default), (operation, p.name)


def case_of(spec: str, **others: Any) -> Case:
    codec, layout = built(spec)
    return Case(codec.kernel_layouts(), HOST, layout=layout, rotates=codec.rotates)._replace(**others)


class Counting(Reference):
    """Serves what it has no reason against, and counts what it is asked and given."""

    name = "Counting"

    def __init__(self, why: str | None = None, declines: bool = False) -> None:
        self.why, self.declines = why, declines
        self.asked: list[str] = []
        self.calls = 0

    def obstacle(self, operation: str, case: Case) -> str | None:
        self.asked.append(operation)
        return self.why

    def attend_tokens(self, *args: Any) -> Any:
        self.calls += 1
        return None if self.declines else super().attend_tokens(*args)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_reference_serves_every_operation_everywhere(operation: str, device: str) -> None:
    case = case_of("fp8" if operation == "attend" else "kivi", device=torch.device(device))
    found = backends.able(operation, case)
    if operation in NO_KERNEL:
        assert backends.REFERENCE not in found
    else:
        assert found[-1] is backends.REFERENCE


@pytest.mark.parametrize("operation", ["shares", "runs", "received", "attend_tokens"])
def test_the_first_without_a_reason_is_taken_and_all_that_follow_are_known(operation: str) -> None:
    one, two, three = Counting("it rains"), Counting(), Counting("no")
    with dispatch.using(one, two, three):
        assert backends.on(operation, HOST) == (two, backends.REFERENCE)
        assert [b.asked for b in (one, two, three)] == [[operation]] * 3
        assert backends.on(operation, HOST) == (two, backends.REFERENCE)  # remembered
        assert [b.asked for b in (one, two, three)] == [[operation]] * 3
        with dispatch.using(three, two):
            assert backends.on(operation, HOST) == (two, backends.REFERENCE)
        assert len(three.asked) == 2  # another order is another question


def test_what_is_declined_goes_to_the_next() -> None:
    declining, serving = Counting(declines=True), Counting()
    q, k = torch.randn(2, 1, 8), torch.randn(2, 5, 8)
    tokens = Tokens(k, k, torch.tensor([5, 2]))
    with dispatch.reference_only():
        expected = dispatch.attend_tokens(q, tokens, 0.3)
    with dispatch.using(declining, serving):
        torch.testing.assert_close(dispatch.attend_tokens(q, tokens, 0.3), expected, rtol=0, atol=0)
    assert (declining.calls, serving.calls) == (1, 1)


@pytest.mark.parametrize(
    ("changed", "asks"),
    [
        ({"rows": 2}, True),
        ({"dtype": torch.bfloat16}, True),
        ({"in_tokens": True}, True),
        ({"lse_of_pages": True}, True),
        ({"rotates": True}, True),
        ({}, False),
    ],
)
def test_a_case_is_remembered_by_all_that_backends_may_decide_by(changed: dict[str, Any], asks: bool) -> None:
    case, one = case_of("kivi"), Counting()
    with dispatch.using(one):
        backends.able("attend", case)
        backends.able("attend", case._replace(**changed))
    assert len(one.asked) == 1 + asks


def test_sides_that_differ_are_asked_about_each_by_itself() -> None:
    """K and V of one codec, and either of them beside another's."""
    (k, v), (other, _) = (built(spec)[0].kernel_layouts() for spec in ("kivi", "int(per=channel, group=24)"))
    case = case_of("kivi")
    assert backends.able("attend", case._replace(sides=(k, v)))[:-1] == backends.able("attend", case)[:-1]
    for sides in ((other, v), (k, other), (other, other)):
        assert backends.able("attend", case._replace(sides=sides)) == (backends.REFERENCE,)
    assert "no multiple of 16" in str(backends.why_reference("attend", case._replace(sides=(other, v))))


def test_what_is_remembered_of_sides_goes_with_them() -> None:
    sides = tuple(SideLayout(side.segments, side.gain) for side in built("turboquant(bits=2)")[0].kernel_layouts())
    before = len(backends._known)
    backends.able("attend", case_of("turboquant(bits=2)", sides=sides))
    assert memo(sides)
    assert len(backends._known) == before
    gone = [weakref.ref(side) for side in sides]
    del sides
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_threads_that_begin_at_once_share_what_is_remembered() -> None:
    sides = [built("kivi")[0].kernel_layouts() for _ in range(50)]
    with ThreadPoolExecutor(8) as pool:
        for one in sides:
            found = list(pool.map(memo, [one] * 16))
            assert all(known is found[0] for known in found)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_side_remember_nothing(copied: Any) -> None:
    codec, layout = built("kivi")
    sides = codec.kernel_layouts()
    backends.able("attend", Case(sides, HOST, layout=layout))
    twins = tuple(copied(side) for side in sides)
    assert not memo(twins)
    assert [twin.channels for twin in twins] == [side.channels for side in sides]


def test_reasons_of_every_backend_and_of_none() -> None:
    codec, layout = built("kivi")
    with dispatch.reference_only():
        assert dispatch.obstacle(codec, layout, HOST) == "it was asked for"
        assert dispatch.write_obstacle(codec.kernel_layouts(), layout, HOST) == "it was asked for"
    assert dispatch.obstacle(codec, layout, torch.device("meta")) == "there is no other kernel for meta"
    with dispatch.using(Counting("it rains"), Counting("it snows")):
        assert dispatch.obstacle(codec, layout, HOST) == "it snows"
        assert dispatch.explain(codec, layout, HOST) == "PyTorch: it snows"
    with dispatch.using(Counting("it rains"), Counting()):
        assert dispatch.obstacle(codec, layout, HOST) is None
        assert dispatch.explain(codec, layout, HOST) == "Counting; not Counting: it rains"
    assert dispatch.obstacle(codec, layout, HOST, MOST_ROWS + 1) is None  # the C kernel takes any number
    assert "more than" in str(case_of("kivi", rows=MOST_ROWS + 1).obstacle)


def test_a_backend_says_which_operations_it_lacks() -> None:
    for backend, lacks in [(C(), "received"), (Triton(anywhere=True), "shares")]:
        with dispatch.using(backend):
            assert dict(backends.asked(lacks, Case(None, HOST)))[backend] == f"it has no kernel for {lacks}"


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("hidden", [False, True])
def test_received_is_its_definition(reduce: Any, softcap: float | None, hidden: bool) -> None:
    """Of both ways to reduce, with keys hidden, among them all that a query sees, and logits capped."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 7, 16), torch.randn(2, 3, 20, 16)
    visible = torch.rand(2, 3, 20) > 0.3
    visible[0, 0, :17] = False  # queries before see nothing
    logits = q.double() @ k.double().repeat_interleave(2, 1).mT * 0.4
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(torch.ones(7, 20, dtype=torch.bool).triu(14), -torch.inf)
    if hidden:
        logits = logits.masked_fill(~visible.repeat_interleave(2, 1)[:, :, None], -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0)
    expected = weights.sum(2) if reduce == "sum" else weights.amax(2)
    found = received(q, k, 0.4, visible if hidden else None, softcap, reduce)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


DOORS = {"backends", "contract", "dispatch", "received", "reference", "select"}
INSIDE = {  # what needs more than an operation: space for a graph's kernels, a peer to be timed against, a driver
    ("decode.py", "triton"),
    ("fake_driver.py", "triton"),
    ("fake_driver.py", "triton_backend"),
    ("phases.py", "triton_backend"),
    ("peers.py", "flashinfer"),
    ("resources.py", "placed"),
    ("resources.py", "triton"),
}


def test_nobody_asks_what_is_installed_but_the_backends() -> None:
    """Outside of kernels/, modules import the entries alone, and so no kernel of any backend."""
    found = set()
    for folder in ("policies", "quantizers", "sparse", "kvcomp", "integrations", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvcomp.kernels"):
                    inside = node.module.removeprefix("kvcomp.kernels").strip(".").split(".")[0]
                    names = {inside} if inside else {alias.name for alias in node.names}
                    found |= {(path.name, name) for name in names - DOORS}
    assert found <= INSIDE


def test_the_reference_and_c_are_alike_by_the_same_doors() -> None:
    torch.manual_seed(1)
    logits, counts = torch.randn(3, 2, 12), torch.tensor([12, 0, 5])
    starts = torch.tensor([[0, 4], [7, 1]])

    def through() -> list[Tensor]:
        wanted = torch.tensor([4, 0, 2])
        chosen = select.choose(logits.clone(), 0.5, counts, 1, wanted, 4, 12, (1, 1))
        return [select.shares(logits.clone(), counts), chosen, dispatch.runs(torch.arange(30.0), starts, 5)]

    with dispatch.reference_only():
        expected = through()
    for a, b in zip(through(), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_groups_survive_exact_tokens_that_are_attended_to_apart() -> None:
    codec, layout = built("int(bits=4, basis=hadamard)")  # rotated: no backend joins tokens
    pool = torch.zeros(2, layout.bytes_per_page, dtype=torch.uint8)
    k = torch.randn(1, 4, 64)
    args = torch.randn(1, 2, 64), pool, torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([2]), layout, codec, 0.1
    part = dispatch.attend_pages(*args, None, True, Tokens(k, k, torch.tensor([4])))
    assert isinstance(part, Part)
    assert part.groups is not None
    assert part.groups.shape == (1, 2, 2)
