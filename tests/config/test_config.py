"""Where settings come from, and that every mistake in them is one line that names the way out."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trainer import workloads
from trainer.__main__ import COMMANDS, main
from trainer.config.options import Duration, RunConfig, UserError, data_root, differences, dump, is_safe
from trainer.config.settings import build_config, config_class, read_yaml
from trainer.run.opened import load_config

KNOWN = f"known: {', '.join(workloads.names())}, or path/to/file.py"
MODEL = workloads.config_model("classifier")


def resolve(words: Sequence[str] = (), values: dict[str, Any] | None = None) -> Any:
    """The config that flags and file values give; Any, because its workload is the classifier's."""
    return build_config(MODEL, values or {}, words, "trainer", "")


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def config(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return yaml.safe_load(self.out)

    @property
    def mistakes(self) -> list[str]:
        """The lines on standard error, each of which must begin with `error: `; nothing else was said."""
        assert self.code == 2, self.out
        assert self.out == ""
        lines = self.err.splitlines()
        assert all(line.startswith("error: ") for line in lines), self.err
        return [line.removeprefix("error: ") for line in lines]

    @property
    def mistake(self) -> str:
        assert len(self.mistakes) == 1, self.err
        return self.mistakes[0]


Ask = Callable[..., Said]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TRAINER_"):
            monkeypatch.delenv(name)


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs `python -m trainer config [run.yaml] WORDS`."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str, file: str | None = None, env: dict[str, str] | None = None) -> Said:
        (tmp_path / "run.yaml").write_text(file or "")
        names = [] if words[:1] and words[0].endswith(".yaml") else ["run.yaml"]
        with monkeypatch.context() as patch:
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            capsys.readouterr()
            code = main(["config", *names, *words])
        return Said(code, *capsys.readouterr())

    return call


# Where settings come from


def test_the_environment_goes_before_the_file_and_flags_go_before_both(ask: Ask) -> None:
    file, env, flag = "optimizer: {lr: 0.1, eps: 0.1}\nseed: 1\n", {"TRAINER_OPTIMIZER__LR": "0.2"}, "--optimizer.lr"
    assert ask().config["optimizer"]["lr"] == 0.001  # of an empty file
    assert ask(file=file).config["optimizer"]["lr"] == 0.1
    assert ask(file=file, env=env).config["optimizer"]["lr"] == 0.2
    config = ask(flag, "0.3", file=file, env=env).config
    assert config["optimizer"]["lr"] == 0.3
    assert (config["optimizer"]["eps"], config["seed"]) == (0.1, 1)  # what is not overridden stays


def test_the_workload_is_set_from_all_three_places(ask: Ask) -> None:
    file, env = "workload: {network: fnn, hidden: 7}\n", {"TRAINER_WORKLOAD__NETWORK": "softmax"}
    assert ask(file=file).config["workload"]["network"] == "fnn"
    workload = ask(file=file, env=env).config["workload"]
    assert (workload["name"], workload["network"], workload["hidden"]) == ("classifier", "softmax", 7)
    assert ask("--workload.network", "lenet5", file=file, env=env).config["workload"]["network"] == "lenet5"


def test_trainer_data_is_the_data_folder_and_no_setting(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_DATA", "/somewhere")
    data = ask("--data.name", "fake").config["data"]
    assert (data["name"], data["root"]) == ("fake", None)
    assert data_root(resolve()) == "/somewhere"
    assert data_root(resolve(["--data.root", "/elsewhere"])) == "/elsewhere"
    monkeypatch.delenv("TRAINER_DATA")
    assert data_root(resolve()) == "data"


def test_a_variable_that_is_no_setting_is_a_mistake_and_not_ignored(ask: Ask) -> None:
    assert ask(env={"TRAINER_OPTIMIZR__LR": "1"}).mistake == (
        "TRAINER_OPTIMIZR__LR: unknown setting; did you mean optimizer.lr?"
    )
    assert ask(env={"TRAINER_LOG": "{}"}).mistake == "TRAINER_LOG: a group of settings: set one of log.every"


def test_the_name_of_the_file_is_the_name_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.commands.common import read_config

    monkeypatch.chdir(tmp_path)
    for path in ("my run.yaml", "runs/seven/config.yaml"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("seed: 5\n")
    assert read_config([], "", "")[1] == "digits_cnn"
    assert read_config(["my run.yaml"], "", "")[1] == "my_run"
    assert read_config(["runs/seven/config.yaml"], "", "")[1] == "seven"
    assert read_config(["--data.flip", "my run.yaml"], "", "")[0].seed == 5  # a flag without a value before the file
    assert read_config(["--seed", "6", "my run.yaml"], "", "")[0].seed == 6


# YAML


def test_a_number_without_a_point_is_a_float() -> None:
    assert read_yaml("a: 1e-3\nb: 5E2\nc: 1_0e+1\nd: 3\ne: 1e\n", "f") == {
        "a": 1e-3, "b": 500.0, "c": 100.0, "d": 3, "e": "1e",
    }  # fmt: skip
    assert isinstance(read_yaml("a: 1e3", "f")["a"], float)


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("a: 1\nb: 2\na: 3\n", "run.yaml: duplicate key 'a' in line 3: keep one of them"),
        ("o:\n  lr: 1\n  lr: 2\n", "run.yaml: duplicate key 'lr' in line 3: keep one of them"),
        ("a: &x 1\nb: *x\n", "run.yaml: YAML aliases (*name) are not supported: write the value out"),
        ("- 1\n", "run.yaml: a config is a mapping of settings, not a list"),
        ("hello\n", "run.yaml: a config is a mapping of settings, not a str"),
        ("1: 2\n", "run.yaml: the key in line 1 is not a name: write `setting: value`"),
        ("? [a, b]\n: 1\n", "run.yaml: the key in line 1 is not a name: write `setting: value`"),
        ("<<: {seed: 1}\n", "run.yaml: the key in line 1 is not a name: write `setting: value`"),
        ("a: [1\n", "run.yaml: not valid YAML in line 2: expected ',' or ']', but got '<stream end>'"),
        ("\ta: 1\n", "run.yaml: not valid YAML in line 1: found character '\\t' that cannot start any token"),
        ("a: 2026-13-01\n", "run.yaml: not valid YAML: month must be in 1..12"),
        ("a: " + "[" * 500 + "]" * 500, "run.yaml: not valid YAML: nested too deeply"),
        ("#" * (1 << 20) + "\n", "run.yaml: too long for a config; the limit is 1048576 bytes"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line(ask: Ask, text: str, mistake: str) -> None:
    assert ask(file=text).mistake == mistake


def test_a_python_tag_is_refused_and_not_run(ask: Ask, tmp_path: Path) -> None:
    said = ask(file=f"seed: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    assert said.mistake.startswith("run.yaml: not valid YAML in line 1: could not determine a constructor")
    assert not (tmp_path / "made").exists()


def test_a_file_that_is_not_text_is_one_line(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    (tmp_path / "zeros.yaml").write_bytes(b"a: \x00")
    (tmp_path / "folder.yaml").mkdir()
    assert ask("picture.yaml").mistake.startswith("picture.yaml: cannot be read as a config: 'utf-8' codec")
    assert ask("zeros.yaml").mistake.startswith("zeros.yaml: not valid YAML: unacceptable character #x0000")
    assert ask("folder.yaml").mistake.startswith("folder.yaml: cannot be read as a config: [Errno 21]")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_either_a_mapping_or_one_mistake(text: str) -> None:
    said = "f: read"
    try:
        assert isinstance(read_yaml(text, "f"), dict)
    except UserError as error:
        said = str(error)
    assert said.startswith("f: ")
    assert len(said.splitlines()) == 1


def test_yes_and_no_are_words_where_they_are_asked_for_and_never_numbers(ask: Ask) -> None:
    assert ask(file="data: {resident: yes}\n").config["data"]["resident"] == "yes"
    assert ask(file="data: {resident: no, flip: yes}\n").config["data"]["resident"] == "no"
    assert ask(file="batch_size: yes\n").mistake == "batch_size: true should be a number"


# Mistakes, each of one line that names setting, value, what is allowed and the way out

SEVERAL = "workload: {network: nope}\nbatch_size: x\noptimizer: {lr: -1, lrr: 2}\noptimizr: {lr: 1}\n"


@pytest.mark.parametrize(
    ("words", "file", "mistake"),
    [
        ([], "optimizr: {lr: 1}", "optimizr: unknown setting; did you mean 'optimizer'?"),
        ([], "optimizer: {lrr: 1}", "optimizer.lrr: unknown setting; did you mean 'lr'?"),
        ([], "log: {zzz: 1}", "log.zzz: unknown setting; known: every"),
        ([], "batch_size: many", "batch_size: 'many' should be a valid integer"),
        ([], "batch_size: 3.5", "batch_size: 3.5 should be a valid integer, got a number with a fractional part"),
        ([], "batch_size: 0", "batch_size: 0 should be greater than or equal to 1"),
        ([], "batch_size: null", "batch_size: null should be a valid integer"),
        ([], "optimizer: 3", "optimizer: 3 should be a mapping of settings"),
        ([], "optimizer: {lr: .nan}", "optimizer.lr: nan should be a finite number"),
        ([], "optimizer: {lr: .inf}", "optimizer.lr: inf should be a finite number"),
        ([], "wandb: {tags: a}", "wandb.tags: 'a' should be a list"),
        ([], "workload: classifier",
         "workload: 'classifier' should be a mapping with a name: 'workload: {name: classifier}'"),
        ([], "workload: {name: cyclegun}", f"workload.name: 'cyclegun' is not known; {KNOWN}"),
        ([], "duration: 5",
         "duration: 5 is not valid: write a number and a unit: steps, epochs, samples, seconds, minutes or hours"),
        (["--duration", "-5 epochs"], None, "duration: '-5 epochs' is not valid: write a number and a unit: steps, "
         "epochs, samples, seconds, minutes or hours"),
        (["--duration", "0 epochs"], None, "duration: '0 epochs' must be longer than zero"),
        (["--duration", "1e999 epochs"], None, "duration: '1e999 epochs' is longer than a run can be"),
        (["--evaluate.every", "1 hour"], None,
         "evaluate.every: '1 hour' must be in steps, epochs or samples, and above zero"),
        (["--schedule.warmup", "1 hour"], None, "schedule.warmup: '1 hour' must be in steps, epochs or samples"),
        (["--optimizer.nesterov"], None,
         "optimizer.nesterov: true needs momentum above zero: set optimizer.momentum, for example to 0.9"),
        (["--optimizer.momentum", "0.9"], None,
         "optimizer.momentum: 0.9 is a setting of sgd, not of adam: use optimizer.betas"),
        (["--schedule.name", "linear", "--duration", "3 hours"], None,
         "schedule.name: 'linear' needs to know the number of steps, which duration '3 hours' does not give: "
         "set duration or schedule.length in epochs, steps or samples, or use constant or step"),
        (["--schedule.name", "cosine", "--duration", "3 hours"], None,
         "schedule.name: 'cosine' needs to know the number of steps, which duration '3 hours' does not give: "
         "set duration or schedule.length in epochs, steps or samples, or use constant or step"),
        (["--accumulation", "64"], None, "accumulation: 64 micro-batches cannot be cut from a batch of 32: "
         "lower accumulation or raise batch_size"),
        (["--workload.network", "cnnn"], None, "workload.network: 'cnnn' is not valid: known networks: softmax, fnn, "
         "cnn, lenet5, vgg_small, alexnet, vgg11_bn, vgg16_bn, vgg19_bn, resnet18, resnet34, resnet50, resnet101, "
         "resnet152, torchvision:NAME, path/to/net.py:Net"),
        (["--workload.network", "torchvision:resnet17"], None, "workload.network: 'torchvision:resnet17' is not valid: "
         "torchvision has no such classification model; it has: resnet18, resnet152, resnet101"),
        (["--workload.name", "ganx"], None, f"workload.name: 'ganx' is not known; {KNOWN}"),
        (["--data.name", "cifar"], None, "data.name: 'cifar' is not valid: known: digits, mnist, "
         "fashion_mnist, cifar10, cifar100, lsun, imagenet, folder, shards, pairs, fake, ring8, grid25, stacked_mnist, "
         "tinyshakespeare, text, or path/to/file.py:FUNCTION; did you mean 'cifar10'?"),
        (["--optimizer.lr", "abc"], None, "optimizer.lr: 'abc' should be a valid number"),
        (["--optimizer.betas", "0.5"], None, "optimizer.betas.1: missing: give a value"),
        (["--optimizer.betas", "0.5", "1.5"], None, "optimizer.betas.1: 1.5 should be less than 1"),
        (["--optimizr.lr", "1"], None, "--optimizr.lr: unknown setting; did you mean --optimizer.lr?"),
        (["--lr=1"], None, "--lr: unknown setting; did you mean --optimizer.lr?"),
        (["--zzz", "1"], None, "--zzz: unknown setting; 'train --help' lists all"),
        (["--log", "{}"], None, "--log: a group of settings: set one of --log.every"),
        (["--data.no-flip=1"], None, "--data.no-flip=1: takes no value: write --data.flip or --data.flip=false"),
        (["--data.flip=maybe"], None, "data.flip: 'maybe' should be a valid boolean"),
        (["--seed", "1", "word"], None,
         "word: neither a flag nor the value of one: give one config file, then --setting value"),
        (["-x"], None, "-x: neither a flag nor the value of one: give one config file, then --setting value"),
        (["--seed"], None, "--seed: has no value: write --seed VALUE, or --seed=VALUE if it begins with --"),
        (["--run.url", "--seed", "1"], None,
         "--run.url: has no value: write --run.url VALUE, or --run.url=VALUE if it begins with --"),
        (["--wandb.tags"], None, "--wandb.tags: has no value: write --wandb.tags VALUE ..."),
        (["--workload.name"], None, "--workload.name: has no value: write --workload.name VALUE, or "
         "--workload.name=VALUE if it begins with --"),
        (["absent.yaml"], None, "no config file 'absent.yaml': check the path"),
        (["run.yml"], None, "run.yml: neither a flag nor the value of one: give one config file, then "
         "--setting value"),
        (["--run.url", "ftp://host/run"], None, "run.url: protocol 'ftp' is not supported; use one of: file, memory, "
         "s3, s3a, gs, gcs, az, abfs, abfss, ssh, sftp, webdav"),
        (["--run.url", "s3://me:secret@bucket/run"], None, "run.url: a password does not belong into a URL: use the "
         "environment or a profile of the backend"),
        (["--run.url", "s3://bucket/../run"], None,
         "run.url: 's3://bucket/../run' must not contain '..': write the path out"),
        (["--run.url", ""], None, "run.url: '' names no place: give a folder, or a URL such as s3://bucket/folder"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(ask: Ask, words: list[str], file: str | None, mistake: str) -> None:
    assert ask(*words, file=file).mistake == mistake


def test_a_misspelt_file_or_command_is_guessed(ask: Ask, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fashion_cnn.yaml").write_text("seed: 1\n")
    assert ask("fashion_cn.yaml").mistake == "no config file 'fashion_cn.yaml': did you mean 'fashion_cnn.yaml'?"
    assert main(["evalute", "runs/x"]) == 2
    assert capsys.readouterr().err == "error: evalute: neither a command nor a config file: did you mean 'evaluate'?\n"


def test_several_mistakes_at_once_are_a_line_each(ask: Ask) -> None:
    said = ask("--sed", "1", "--seed", file=SEVERAL, env={"TRAINER_DATTA__ROOT": "x"})
    assert [line.split(":")[0] for line in said.mistakes] == [
        "--sed", "--seed", "TRAINER_DATTA__ROOT", "workload.network", "batch_size", "optimizer.lr", "optimizer.lrr",
        "optimizr",
    ]  # fmt: skip


def test_only_the_first_rank_complains(ask: Ask) -> None:
    said = ask("--seed", env={"RANK": "1", "WORLD_SIZE": "2"})
    assert (said.code, said.out, said.err) == (2, "", "")


# Flags


def test_a_value_may_begin_with_a_dash_and_hold_anything(ask: Ask) -> None:
    for value in ("-x", "-1", 'it\'s "a b"', "a=b", '["a"', '{"a": 1}', "a,b", "None", "--x", " ", "é\n", ""):
        words = ["--wandb.project", value] if not value.startswith("--") else [f"--wandb.project={value}"]
        assert ask(*words).config["wandb"]["project"] == value


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example("--")
@given(st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda text: text != "null"))
def test_every_text_reaches_its_setting_as_it_is(text: str) -> None:
    assert resolve([f"--wandb.project={text}"]).wandb.project == text


def test_null_turns_a_setting_off(ask: Ask) -> None:
    assert (
        ask("--optimizer.clip_norm", "null", file="optimizer: {clip_norm: 1}\n").config["optimizer"]["clip_norm"]
        is None
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data.flip"], True), (["--data.flip", "true"], True), (["--data.flip=yes"], True),
        (["--data.flip", "false"], False), (["--data.flip=0"], False), (["--data.no-flip"], False),
        (["--no-data.flip"], False), (["--data.no_flip"], False), (["--data.flip", "--seed", "1"], True),
        (["--data.flip", "--data.no-flip"], False),
    ],
)  # fmt: skip
def test_a_boolean_is_switched_on_off_or_said_in_words(ask: Ask, words: list[str], expected: bool) -> None:
    file = f"data: {{flip: {str(not expected).lower()}}}\n"
    assert ask(*words, file=file).config["data"]["flip"] is expected


def test_an_optional_boolean_is_a_flag_too(ask: Ask) -> None:
    assert ask().config["channels_last"] is None
    assert ask("--channels_last").config["channels_last"] is True
    assert ask("--no-channels-last").config["channels_last"] is False


@pytest.mark.parametrize("words", [["a b", "c"], ["a b,c"], ['["a b", "c"]']])
def test_a_list_is_words_or_commas_or_json(ask: Ask, words: list[str]) -> None:
    assert ask("--wandb.tags", *words, "--seed", "1").config["wandb"]["tags"] == ["a b", "c"]
    if len(words) == 1:
        assert ask(f"--wandb.tags={words[0]}").config["wandb"]["tags"] == ["a b", "c"]
        assert ask(env={"TRAINER_WANDB__TAGS": words[0]}).config["wandb"]["tags"] == ["a b", "c"]


def test_betas_are_two_numbers(ask: Ask) -> None:
    for words in (["0.5", "0.9"], ["0.5,0.9"], ["[0.5, 0.9]"]):
        assert ask("--optimizer.betas", *words).config["optimizer"]["betas"] == [0.5, 0.9]


def test_dashes_and_underscores_are_the_same_and_the_last_flag_counts(ask: Ask) -> None:
    config = ask("--batch-size", "7", "--optimizer.weight-decay=0.5", "--batch_size", "8").config
    assert (config["batch_size"], config["optimizer"]["weight_decay"]) == (8, 0.5)


# What is printed


def test_the_printed_config_reads_back_to_itself(ask: Ask) -> None:
    words = (
        "--data.resident",
        "yes",
        "--wandb.tags",
        "a: b",
        "#c",
        "--wandb.project",
        "null ",
        "--optimizer.lr",
        "1e-3",
    )
    printed = ask(*words).out
    assert ask(file=printed).out == printed
    stored = load_config(printed, "run.yaml")
    assert dump(stored).rstrip() == printed.rstrip()
    assert stored.optimizer.lr == 0.001
    assert stored.wandb.tags == ("a: b", "#c")


@settings(max_examples=40, deadline=None)
@example("\x85", 1e-3, "yes", 0)
@example("\u2028 é", 1e-3, "no", 0)
@example("0E0", 1e-3, "no", 0)
@given(
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.floats(1e-12, 1e3),
    st.sampled_from(["yes", "no", "auto"]),
    st.integers(0, 2**31 - 1),
)
def test_any_config_survives_its_yaml(project: str, lr: float, resident: str, seed: int) -> None:
    values = {"wandb": {"project": project}, "optimizer": {"lr": lr}, "data": {"resident": resident}, "seed": seed}
    config = resolve(values=values)
    again = resolve(values=read_yaml(dump(config), "f"))
    assert again == config
    assert differences(config.model_dump(mode="json"), again.model_dump(mode="json")) == {}


def test_the_schema_describes_every_setting(ask: Ask) -> None:
    said = ask("--schema")
    assert said.code == 0
    schema = json.loads(said.out)
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    groups = {"Config": schema, **schema["$defs"]}
    assert {"OptimizerOptions", "DataOptions", "RunOptions"} <= set(groups)
    for group, model in groups.items():
        for name, setting in model["properties"].items():
            is_group = "$ref" in setting or "discriminator" in setting
            assert is_group or setting.get("description"), f"{group}.{name} has no description"
    assert set(schema["properties"]) == set(RunConfig.model_fields)


def test_the_schema_of_several_workloads_tells_them_apart_by_name() -> None:
    from typing import Literal

    from trainer.config.options import WorkloadOptions

    class One(WorkloadOptions):
        name: Literal["one"] = "one"

    class Two(WorkloadOptions):
        name: Literal["two"] = "two"

    workload = config_class(One, Two).model_json_schema()["properties"]["workload"]
    assert workload["discriminator"]["propertyName"] == "name"
    assert len(workload["oneOf"]) == 2


# Help


def help_of(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    code: Any = 0
    try:
        code = main(words)
    except SystemExit as end:  # argparse leaves by itself
        code = end.code
    assert code == 0
    return capsys.readouterr().out


def test_the_help_of_every_command_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overview = help_of(["--help"], capsys, monkeypatch)
    assert overview == help_of(["help"], capsys, monkeypatch)
    for words in ([], *([command] for command in COMMANDS)):
        text = help_of([*words, "--help"], capsys, monkeypatch)
        assert text.startswith("usage: python -m trainer")
        assert [line for line in text.splitlines() if len(line) > 80] == []
        assert "{" not in text, "choices in braces are hard to read"
        assert not words or words[0] in overview
    assert help_of(["help", "config"], capsys, monkeypatch) == help_of(["config", "--help"], capsys, monkeypatch)


def fields_of(model: Any, prefix: str = "") -> dict[str, Any]:
    fields = {}
    for name, field in model.model_fields.items():
        inner = hasattr(field.annotation, "model_fields")
        fields |= fields_of(field.annotation, f"{prefix}{name}.") if inner else {prefix + name: field}
    return fields


def test_the_help_names_every_setting_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_NONSENSE", "1")  # help is given even then
    text = " ".join(help_of(["train", "--seed", "x", "--help"], capsys, monkeypatch).split())

    fields = {name: field for name, field in fields_of(MODEL).items() if name != "code"}  # which is filled in
    places = {name: re.search(rf" --{re.escape(name)}[ ,]", text) for name in fields}
    assert [name for name, place in places.items() if place is None] == []
    starts = sorted(place.start() for place in places.values() if place)
    for name, field in fields.items():
        start = places[name].start()  # type: ignore[union-attr]
        own = text[start : next((s for s in starts if s > start), None)]
        assert field.description, f"{name} has no description"
        assert " ".join(field.description.split()) in own
        assert ("Default: " if field.default in (None, ()) else f"(default: {field.default})") in own


# Durations

UNITS = ["step", "steps", "epoch", "epochs", "sample", "samples", "second", "seconds", "minute", "hours"]
AMOUNTS = st.decimals(0, 10**6, places=3, allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(AMOUNTS, st.sampled_from(UNITS), st.sampled_from(["", " ", "  "]))
def test_a_duration_is_a_number_and_a_unit(amount: Any, unit: str, space: str) -> None:
    parsed = Duration.parse(f" {amount}{space}{unit} ")
    assert parsed.amount == float(amount)
    assert parsed.unit.rstrip("s") == unit.rstrip("s")
    assert (parsed.seconds is None) == (parsed.unit in ("steps", "epochs", "samples"))


def test_durations_are_converted_to_seconds() -> None:
    assert Duration.parse("90 seconds").seconds == 90.0
    assert Duration.parse("1.5 minutes").seconds == 90.0
    assert Duration.parse("3 hours").seconds == 10800.0
    assert Duration.parse("1e3 steps").amount == Duration.parse("1_000 steps").amount == 1000.0


@settings(max_examples=300, deadline=None)
@given(AMOUNTS, st.integers(1, 10**4), st.integers(1, 10**6))
def test_a_duration_in_training_is_rounded_up_to_steps_exactly(amount: Any, batch: int, epoch: int) -> None:
    exact = Fraction(str(amount))
    assert Duration.parse(f"{amount} steps").steps(batch, epoch) == math.ceil(exact)
    assert Duration.parse(f"{amount} samples").steps(batch, epoch) == math.ceil(exact / batch)
    assert Duration.parse(f"{amount} epochs").steps(batch, epoch) == math.ceil(exact * epoch / batch)


def test_a_part_of_an_epoch_is_no_step_too_long() -> None:
    assert Duration.parse("0.07 epochs").steps(10, 1000) == 7  # 7.000000000000001 in floats
    assert Duration.parse("5 epochs").steps(64, 1198) == 94
    assert Duration.parse("1 sample").steps(64, 1198) == 1
    assert Duration.parse("0 steps").steps(64, 1198) == 0


@pytest.mark.parametrize(
    "text", ["", "5", "epochs", "5 parsecs", "-1 steps", "1e-3 steps", "nan steps", "5 epochs now"]
)
def test_what_is_not_a_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write a number and a unit"):
        Duration.parse(text)


# What may change between the lives of a run


def test_differences_are_named_and_what_changes_the_result_is_not_safe() -> None:
    changed = ["--optimizer.lr", "1", "--data.workers", "0"]
    old, new = (resolve(words).model_dump(mode="json") for words in ([], changed))
    assert differences(old, new) == {"optimizer.lr": (0.001, 1.0), "data.workers": (2, 0)}
    assert is_safe("data.workers")
    assert is_safe("checkpoint.keep")
    assert is_safe("duration")
    assert not is_safe("optimizer.lr")
    assert not is_safe("data.name")
    assert not is_safe("seed")
    assert not is_safe("durations")
