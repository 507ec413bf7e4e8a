"""Who may import whom, and that workloads take their randomness from Draws alone. Read from the source, not run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trainer

ROOT = Path(trainer.__file__).parent
ROOMS = {  # who may import whom, from the bottom up; a file of the root is a room of its own
    "storage": set(),
    "config": {"storage"},
    "randomness": set(),
    "schedule": set(),
    "clock": set(),
    "figures": set(),
    "data": {"config", "randomness"},
    "nn": {"config", "randomness"},
    "metrics": {"data", "randomness"},
    "pixels": {"randomness"},
    "workload": {"data", "figures", "metrics", "randomness"},
    "gan": {"config", "data", "figures", "metrics", "nn", "randomness", "workload"},
    "workloads": {"config", "data", "figures", "gan", "metrics", "nn", "randomness", "workload"},
    "distributed": {"data", "metrics", "nn", "randomness", "storage", "workload"},
    "state": {"clock", "data", "distributed", "nn", "storage", "workload"},
    "services": {"data", "figures", "metrics", "storage"},
    "evaluation": {"distributed", "metrics", "nn", "randomness", "services", "workload"},
    "boundary": {"clock", "config", "distributed", "evaluation", "metrics", "nn", "randomness", "schedule", "services",
                 "state"},
    "graphs": {"randomness", "services", "workload"},
    "engine": {"boundary", "config", "distributed", "graphs", "randomness", "schedule", "services", "workload"},
    "tracking": {"config", "figures", "metrics", "storage"},
    "run": {"boundary", "config", "data", "distributed", "engine", "figures", "metrics", "nn", "pixels", "schedule",
            "services", "state", "storage", "tracking", "workload", "workloads"},
    "commands": {"config", "data", "distributed", "evaluation", "figures", "nn", "pixels", "randomness", "run",
                 "storage", "tracking", "workloads"},
    "__main__": {"commands", "config", "distributed", "state", "storage"},
    "__init__": set(),
}  # fmt: skip


def imports(file: Path) -> set[str]:
    """The parts of `trainer` that a file imports anywhere, each by its first name."""
    parts: set[str] = set()
    package = ["trainer", *file.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            names = [[*base, alias.name] for alias in node.names] if len(base) < 2 else [base]
        else:
            continue
        parts |= {name[1] for name in names if name[0] == "trainer" and len(name) > 1}
    return parts - {"__version__"}


def room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_imports_only_what_its_room_may(file: Path) -> None:
    assert imports(file) - {room(file)} <= ROOMS[room(file)]


def test_the_table_has_no_circle_and_names_what_exists() -> None:
    assert {room(file) for file in FILES} == set(ROOMS)
    below: set[str] = set()
    while len(below) < len(ROOMS):
        ready = {name for name, needs in ROOMS.items() if name not in below and needs <= below}
        assert ready, f"a circle among {set(ROOMS) - below}"
        below |= ready


def test_every_room_has_its_tests() -> None:
    folders = {path.name for path in Path(__file__).parent.iterdir() if any(path.glob("test_*.py"))}
    assert {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"} <= folders


def test_settings_can_be_read_without_torch() -> None:
    """launch/ does so on login nodes, and the help of a command would take seconds."""
    modules = sorted(
        f"trainer.config.{path.stem}" for path in (ROOT / "config").glob("*.py") if path.stem != "__init__"
    )
    code = f"import sys, {', '.join(modules)}; print({{'torch', 'numpy', 'fsspec'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    assert done.stdout.strip() == "set()"


def test_only_the_runtime_knows_accelerate_and_the_process_group() -> None:
    distributed = {"distributed/runtime.py", "nn/norm.py"}  # the global BatchNorm is a collective by nature
    for file in FILES:
        name = str(file.relative_to(ROOT))
        text = file.read_text()
        assert name == "distributed/runtime.py" or not re.search(r"^\s*(from|import) accelerate", text, re.M), name
        assert name in distributed or "torch.distributed" not in text, name


FORBIDDEN = re.compile(
    r"torch\.(rand|randn|randint|randperm|bernoulli|multinomial|normal|poisson)(_like)?\("
    r"|\.(normal_|uniform_|bernoulli_|random_|exponential_)\("
    r"|nn\.(Alpha|Feature)?(Alpha)?Dropout|F\.(alpha_|feature_)?dropout|np\.random|(?<!chance\.)\brandom\.\w+\("
)


def test_workloads_take_no_randomness_but_from_draws() -> None:
    for file in sorted((ROOT / "workloads").glob("*.py")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            match = FORBIDDEN.search(line.replace("nn.init.", "init "))  # initial weights come from the seed
            assert match is None, f"{file.name}:{number}: {line.strip()}: use Draws"


@pytest.mark.parametrize(
    "line",
    ["z = torch.randn(3)", "torch.rand_like(x)", "nn.Dropout(0.5)", "F.dropout(x)", "x.normal_()", "random.random()"],
)
def test_the_search_for_randomness_finds_it(line: str) -> None:
    assert FORBIDDEN.search(line)
