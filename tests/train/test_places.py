"""Where ranks come from: the table, its edges, and that it is the one of the docs."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storm.train import ranks

REPO = Path(__file__).resolve().parents[2]
JOB = {"SLURM_JOB_ID": "417", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "4", "SLURM_PROCID": "0",
       "SLURM_LOCALID": "0"}  # fmt: skip
TASK = JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
              "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURMD_NODENAME": "gpu08"}  # fmt: skip
LAUNCHED = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1234"}
ONE_NODE = LAUNCHED | {"LOCAL_RANK": "2", "MASTER_PORT": "29500", "LOCAL_SIZE": "4", "SLURM_JOB_ID": "417"}


@pytest.mark.parametrize(
    ("env", "route", "place", "meeting"),
    [
        ({}, "alone", (0, 1, 0), None),
        ({"LOCAL_RANK": "0"}, "alone", (0, 1, 0), None),
        (LAUNCHED, "launcher", (2, 4, 0), ("here", 1234)),
        (LAUNCHED | TASK, "launcher", (2, 4, 0), ("here", 1234)),  # torchrun, one task per node
        (ONE_NODE, "launcher", (2, 4, 2), ("here", 12417)),  # the deepspeed launcher's own port
        (ONE_NODE | {"LOCAL_SIZE": "2"}, "launcher", (2, 4, 2), ("here", 29500)),  # other nodes do not know the job
        (ONE_NODE | {"MASTER_PORT": "1234"}, "launcher", (2, 4, 2), ("here", 1234)),
        (TASK, "step", (3, 4, 1), ("gpu07", 12417)),
        (TASK | {"MASTER_ADDR": "ib-gpu07", "MASTER_PORT": "1234"}, "step", (3, 4, 1), ("ib-gpu07", 1234)),
        (TASK | {"RANK": "3", "LOCAL_RANK": "1"}, "step", (3, 4, 1), ("gpu07", 12417)),  # a container's hook
        (JOB, "alone", (0, 1, 0), None),  # the batch shell
        (TASK | {"SLURM_STEP_ID": "4294967291"}, "alone", (0, 1, 0), None),  # the same, of newer versions
        (TASK | {"SLURM_STEP_ID": "4294967290"}, "alone", (0, 1, 0), None),  # the shell of salloc
        (TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "alone", (0, 1, 0), None),
    ],
)
def test_the_place_of_a_process(
    env: dict[str, str], route: str, place: tuple[int, int, int], meeting: tuple[str, int] | None
) -> None:
    found = ranks.find(env)
    assert (found.route, (found.rank, found.size, found.local_rank)) == (route, place)
    assert meeting in (None, (found.address, found.port))
    assert ranks.find(found.variables()).variables().keys() == found.variables().keys()  # what a child would read


@pytest.mark.parametrize(
    ("env", "error"),
    [
        ({"RANK": "0"}, "RANK is set, but not all of RANK, WORLD_SIZE, LOCAL_RANK"),
        (LAUNCHED | {"RANK": "4"}, "RANK=4, WORLD_SIZE=4, LOCAL_RANK=0: no such rank"),
        (LAUNCHED | {"LOCAL_RANK": "3"}, "no such rank"),
        (LAUNCHED | {"RANK": "two"}, "RANK=two: is no number"),
        (LAUNCHED | {"MASTER_PORT": "http"}, "MASTER_PORT=http: is no number"),
        ({name: LAUNCHED[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}, "MASTER_ADDR is not set"),
        (LAUNCHED.copy() | {"MASTER_PORT": ""}, "MASTER_PORT="),
    ],
)
def test_an_environment_that_does_not_tell_is_refused(env: dict[str, str], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ranks.find(env)


@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 10**7))
def test_all_tasks_of_a_step_get_places_that_fit_together(nodes: int, tasks: int, job: int) -> None:
    size = nodes * tasks
    found = [
        ranks.find(
            TASK | {"SLURM_JOB_ID": str(job), "SLURM_STEP_NUM_TASKS": str(size), "SLURM_PROCID": str(rank),
                    "SLURM_LOCALID": str(rank % tasks), "SLURM_STEP_NODELIST": f"n[1-{nodes}]"}
        ) for rank in range(size)
    ]  # fmt: skip
    assert [place.rank for place in found] == list(range(size)) and {place.size for place in found} == {size}
    if size > 1:
        ((address, port),) = {(place.address, place.port) for place in found}
        assert address == "n1" and 12_000 <= port < 28_000


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("gpu[03-07,9],login", "gpu03"), ("r[1-2]n[01-04]", "r1n01"), ("", ""),
     ("r[2]n1-ib,a[1-2]", "r2n1-ib"), ("127.0.0.[1-2]", "127.0.0.1")],
)  # fmt: skip
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert ranks.first_host(nodes) == first


def test_the_only_rank_of_torchrun_joins_the_store_that_torchrun_opened() -> None:
    env = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "41234"}
    assert ranks.find(env).port != 41234
    found = ranks.find(env | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert (found.address, found.port) == ("10.0.0.1", 41234)


def test_an_allocation_without_a_step_is_warned_of() -> None:
    assert "job 417 has 4 tasks and this is one process" in ranks.unlaunched(JOB)
    assert "srun --ntasks=4 " in ranks.unlaunched(JOB)
    for fine in ({}, TASK, JOB | LAUNCHED, JOB | {"SLURM_NTASKS": "1"}, {"SLURM_JOB_ID": "417"}):
        assert ranks.unlaunched(fine) == ""


def test_ranks_that_are_not_alike_are_named_by_host() -> None:
    facts = [(f"n{i // 2}", {"device": "A", "torch": "2.6"}) for i in range(6)]
    assert ranks.unequal(facts) == "" == ranks.unequal(facts[:1])
    facts[3] = ("n1", {"device": "B", "torch": "2.6"})
    assert ranks.unequal(facts) == "device: A on n0, n1, n2; B on n1"
    facts[0] = ("n0", {"device": "A", "torch": "2.7"})
    assert ranks.unequal(facts) == "device: A on n0, n1, n2; B on n1 | torch: 2.6 on n0, n1, n2; 2.7 on n0"


def test_the_docs_have_the_table() -> None:
    rows = [tuple(cells) for cells in re.findall(r"^\| (\w+) \| (.+) \| (.+) \|$", text(), re.MULTILINE)]
    assert [row for row in rows if row[0] in {route.name for route in ranks.ROUTES}] == [
        (route.name, route.where, ", ".join(route.variables) or "0 of 1") for route in ranks.ROUTES
    ]


def text() -> str:
    return (REPO / "launch" / "README.md").read_text()
