"""Who may import whom, and that workloads take their randomness from Draws alone. Read from the source, not run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import trainer

ROOT = Path(trainer.__file__).parent
ALLOWED: dict[str, set[str]] = {
    "config": {"yaml_file"},
    "yaml_file": set(),
    "settings": {"config", "yaml_file"},
    "storage": set(),
    "schedule": set(),
    "randomness": set(),
    "checkpoint": {"storage"},
    "lease": {"storage"},
    "metric_log": {"storage"},
    "console": set(),
    "tracker": {"storage", "metrics", "metric_log", "console"},
    "wandb_sink": {"storage"},
    "workload": {"randomness"},
    "state": {"workload"},
    "pictures": {"workload"},
    "deadline": set(),
    "elastic": set(),
    "goodput": {"storage"},
    "place": set(),
    "runtime": {"workload", "randomness", "nn", "deadline", "elastic", "place"},
    "metrics": {"workload"},
    "adversarial": {"config", "workload", "randomness", "nn"},
    "meters": {"workload", "runtime"},
    "engine": {"workload", "state", "runtime", "randomness", "schedule", "metrics", "meters"},
    "nn": {"config", "randomness", "workload"},
    "data": {"config", "workload", "randomness"},
    "workloads": {"adversarial", "config", "workload", "randomness", "nn"},
}
SHELL = {
    "__init__",
    "__main__",
    "commands",
    "run",
    "doctor",
    "exported",
    "parts",
    "directory",
    "trained",
    "quality",
}  # builds the parts and hands them over: knows all


def imports(file: Path) -> set[str]:
    """The parts of `trainer` that a file imports anywhere, each by its first name."""
    found: set[str] = set()
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
        found |= {name[1] for name in names if name[0] == "trainer" and len(name) > 1}
    return found - {"__version__"}


def part(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(file: Path) -> None:
    name = part(file)
    if name in SHELL:
        return
    assert name in ALLOWED, f"{name} is new: say in ALLOWED what it may import"
    assert imports(file) - {name} <= ALLOWED[name]


def test_the_rules_have_no_circle_and_name_what_exists() -> None:
    assert {part(file) for file in FILES} == set(ALLOWED) | SHELL
    below: dict[str, set[str]] = {}
    while len(below) < len(ALLOWED):
        ready = [name for name, needs in ALLOWED.items() if name not in below and needs <= set(below)]
        assert ready, f"a circle among {set(ALLOWED) - set(below)}"
        below |= {name: ALLOWED[name] for name in ready}


def test_only_the_runtime_knows_accelerate_and_the_process_group() -> None:
    distributed = {"runtime.py", "nn/norm.py"}  # the global BatchNorm is a collective by nature
    for file in FILES:
        name = str(file.relative_to(ROOT))
        text = file.read_text()
        assert name == "runtime.py" or not re.search(r"^\s*(from|import) accelerate", text, re.M), name
        assert name in distributed or "torch.distributed" not in text, name


FORBIDDEN = re.compile(
    r"torch\.(rand|randn|randint|randperm|bernoulli|multinomial|normal|poisson)(_like)?\("
    r"|\.(normal_|uniform_|bernoulli_|random_|exponential_)\("
    r"|nn\.(Alpha|Feature)?(Alpha)?Dropout|F\.(alpha_|feature_)?dropout|np\.random|(?<!chance\.)\brandom\.\w+\("
)


def test_workloads_take_no_randomness_but_from_draws() -> None:
    for file in sorted((ROOT / "workloads").glob("*.py")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            found = FORBIDDEN.search(line.replace("nn.init.", "init "))  # initial weights come from the seed
            assert found is None, f"{file.name}:{number}: {line.strip()}: use Draws"


@pytest.mark.parametrize(
    "line",
    ["z = torch.randn(3)", "torch.rand_like(x)", "nn.Dropout(0.5)", "F.dropout(x)", "x.normal_()", "random.random()"],
)
def test_the_search_for_randomness_finds_it(line: str) -> None:
    assert FORBIDDEN.search(line)
