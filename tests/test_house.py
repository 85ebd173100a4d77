"""The rules of the house over all files, with no snapshot, and for each rule an offence that it must see."""

from collections.abc import Callable, Iterable

import house
import pytest
import tiny

COMMANDS = ("scripts", "scripts/baselines", "scripts/experiments")
ROOMS = ("shared", "algos", *COMMANDS, "scripts/lab", "scripts/papers", "tests", "tests/faults")


def read(room: str) -> dict[str, str]:
    """The Python files of a room, by their path from the root."""
    texts = {}
    for path in sorted((tiny.ROOT / room).glob("*.py")):
        texts[f"{room}/{path.name}"] = path.read_text(encoding="utf-8")
    return texts


FILES = {path: text for room in ROOMS for path, text in read(room).items()}
CODE = {path: text for path, text in FILES.items() if not path.startswith("tests/")}
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in [*tiny.ROOT.glob("*.md"), *tiny.ROOT.glob("docs/*.md")]
}


def offences_of(rule: Callable[..., list[str]], files: dict[str, str], *arguments: object) -> list[str]:
    offences = []
    for path, source in files.items():
        offences += rule(path, source, *arguments)
    return offences


def assert_none(offences: Iterable[str]) -> None:
    shown = "\n".join(offences)
    assert not shown, f"\n{shown}"


def worst_first(values: dict[str, float], limit: float) -> list[str]:
    """The values over a limit, the largest first."""
    over = [name for name, value in values.items() if value > limit]
    over.sort(key=lambda name: -values[name])
    return [f"{values[name]:.4g} > {limit}  {name}" for name in over]


def in_folder(*rooms: str) -> dict[str, str]:
    return {path: text for path, text in FILES.items() if house.room_of(path) in rooms}


def test_every_room_has_files() -> None:
    for room in ROOMS:
        assert in_folder(room), room


# ---------------------------------------------------------------- imports


def test_imports_go_down_the_house() -> None:
    assert_none(offences_of(house.imports_upward, CODE, FILES))


PATHS = ["shared/__init__.py", "shared/run.py", "algos/dpo.py", "algos/ipo.py", "scripts/lab/plots.py"]
PATHS += ["scripts/sample.py", "scripts/score.py", "scripts/bandits.py", "tests/tiny.py"]
PATHS += ["scripts/papers/__init__.py", "scripts/papers/typo.py", "scripts/papers/exo.py"]
PATHS += ["scripts/baselines/ppo.py", "scripts/experiments/dpo.py", "scripts/experiments/exo.py"]


@pytest.mark.parametrize(
    "path, line",
    [
        ("shared/run.py", "from algos.dpo import dpo_loss"),
        ("shared/run.py", "def main():\n    from scripts.lab import plots"),
        ("algos/ipo.py", "from algos.dpo import dpo_loss"),
        ("algos/ipo.py", "import scripts.lab.plots"),
        ("scripts/lab/plots.py", "from scripts.sample import main"),
        ("scripts/sample.py", "from scripts import score"),
        ("scripts/sample.py", "import score"),
        ("scripts/sample.py", "from scripts.papers import typo"),
        ("scripts/sample.py", "import tiny"),
        ("scripts/sample.py", "from . import score"),
        ("scripts/papers/exo.py", "from scripts.papers import typo"),
        ("scripts/papers/exo.py", "import scripts.papers.typo as typo"),
        ("scripts/papers/exo.py", "from scripts.bandits import SECTIONS"),
        ("scripts/baselines/ppo.py", "from scripts.sample import main"),
        ("scripts/experiments/dpo.py", "from scripts.experiments import exo"),
        ("scripts/experiments/dpo.py", "from scripts.papers import exo"),
        ("scripts/lab/plots.py", "from scripts.baselines import ppo"),
    ],
)
def test_an_import_upward_is_seen(path: str, line: str) -> None:
    assert house.imports_upward(path, line, PATHS)


@pytest.mark.parametrize(
    "path, line",
    [
        ("shared/run.py", "from shared import UserError\nimport torch"),
        ("algos/ipo.py", "from shared.run import Run"),
        ("scripts/sample.py", "from scripts.lab.plots import canvas\nfrom algos.dpo import dpo_loss"),
        ("scripts/papers/exo.py", "from scripts.papers import Section"),
        ("scripts/experiments/dpo.py", "from scripts.lab.plots import canvas\nfrom algos.dpo import dpo_loss"),
        ("scripts/bandits.py", "from scripts.papers import Args, typo"),
    ],
)
def test_an_import_downward_is_allowed(path: str, line: str) -> None:
    assert not house.imports_upward(path, line, PATHS)


def test_no_circle_in_shared() -> None:
    graph = house.import_graph(in_folder("shared"), ["load", "call"])
    assert house.circle(graph) == []


def test_a_circle_is_seen() -> None:
    files = {
        "shared/a.py": "from shared import b",
        "shared/b.py": "def function():\n    import shared.c",
        "shared/c.py": "from shared.a import name",
    }
    assert house.circle(house.import_graph(files, ["load"])) == []
    assert set(house.circle(house.import_graph(files, ["load", "call"]))) == {"shared.a", "shared.b", "shared.c"}


@pytest.mark.parametrize("room", ["shared.rows", "shared.encode", "shared.groups"])
def test_reading_rows_loads_no_model(room: str) -> None:
    graph = house.import_graph(in_folder("shared"), ["load"])
    assert not house.reachable(room, graph) & {"shared.model", "shared.loading"}


def test_what_an_import_loads() -> None:
    files = {
        "shared/rows.py": "from shared.files import sha256_of",
        "shared/files.py": "import shared.model",
        "shared/model.py": "def load():\n    import shared.loading",
        "shared/loading.py": "",
    }
    graph = house.import_graph(files, ["load"])
    assert house.reachable("shared.rows", graph) == {"shared.rows", "shared.files", "shared.model"}


def test_mocks_are_for_tests() -> None:
    assert_none(offences_of(house.mocks, CODE))


@pytest.mark.parametrize(
    "line", ["from unittest import mock", "from unittest.mock import patch", "import unittest.mock"]
)
def test_a_mock_is_seen(line: str) -> None:
    assert house.mocks("shared/run.py", line)


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    assert_none(offences_of(house.heavy_imports, CODE))


@pytest.mark.parametrize(
    "line",
    [
        "import transformers",
        "from torch.distributed.fsdp import fully_shard",
        "try:\n    import matplotlib.pyplot as plt\nexcept ImportError:\n    plt = None",
        "class Data:\n    from datasets import Dataset",
    ],
)
def test_a_heavy_import_is_seen(line: str) -> None:
    assert house.heavy_imports("shared/run.py", line)


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed",
        "def load():\n    import transformers",
        "if TYPE_CHECKING:\n    from transformers import PretrainedConfig",
    ],
)
def test_other_imports_are_allowed(line: str) -> None:
    assert not house.heavy_imports("shared/run.py", line)


# ---------------------------------------------------------------- functions


def test_functions_are_short() -> None:
    lengths: dict[str, float] = {}
    for path, source in FILES.items():
        lengths |= house.function_lengths(path, source)
    assert_none(worst_first(lengths, 60))


def test_functions_are_flat() -> None:
    depths: dict[str, float] = {}
    for path, source in FILES.items():
        depths |= house.function_nesting(path, source)
    assert_none(worst_first(depths, 3))


def test_a_function_s_length_and_nesting() -> None:
    source = (
        "def f(x):\n    for y in x:\n        if y:\n            pass\n        elif x:\n            pass\n    return 1\n"
    )
    assert house.function_lengths("a.py", source) == {"a.py:1: f": 7}
    assert house.function_nesting("a.py", source) == {"a.py:1: f": 2}


def test_the_worst_comes_first() -> None:
    assert worst_first({"a": 3, "b": 61, "c": 62}, 60) == ["62 > 60  c", "61 > 60  b"]


# ---------------------------------------------------------------- density

SCRIPTS = (*COMMANDS, "scripts/lab")
TESTS = ("tests", "tests/faults")


@pytest.mark.parametrize(
    "rooms, limit",
    [
        (["algos"], 9.5),
        (["shared"], 9.5),
        (SCRIPTS, 9.5),
        (["scripts/papers"], 11),
        (TESTS, 10.5),
    ],
)
def test_density_of_a_folder(rooms: Iterable[str], limit: float) -> None:
    densities = {path: house.density(source) for path, source in in_folder(*rooms).items()}
    total = house.total_density(densities.values())
    worst = worst_first({path: file.tokens_per_line for path, file in densities.items()}, limit)
    shown = "\n".join(worst[:10])
    assert total.tokens_per_line <= limit, f"tokens a line in {', '.join(rooms)}; the densest files:\n{shown}"


def test_density_of_a_file() -> None:
    densities = {path: house.density(source).tokens_per_line for path, source in FILES.items()}
    code = {path: tokens for path, tokens in densities.items() if path in CODE}
    tests = {path: tokens for path, tokens in densities.items() if path not in CODE}
    assert_none(worst_first(code, 12) + worst_first(tests, 13))


@pytest.mark.parametrize("rooms", [["algos"], ["shared"], (*SCRIPTS, "scripts/papers")])
def test_few_parallel_assignments_and_conditional_expressions(rooms: Iterable[str]) -> None:
    files = {path: house.density(source) for path, source in in_folder(*rooms).items()}
    total = house.total_density(files.values())
    worst = worst_first({path: file.parallel + file.conditional for path, file in files.items()}, 0)
    shown = "\n".join(worst[:10])
    assert total.per_thousand_lines(total.parallel) <= 10, f"parallel assignments; most in\n{shown}"
    assert total.per_thousand_lines(total.conditional) <= 10, f"conditional expressions; most in\n{shown}"


@pytest.mark.parametrize(
    "source, lines, tokens",
    [
        ("x = 1\n", 1, 3),
        ("x = f(a,\n      b)\n", 2, 8),
        ('"""A docstring."""\n\n# a comment\nx = "text"  # a remark\n', 1, 2),
        ("x = [1, 2]\n", 1, 7),
        ("x = [1, 2, 3]\n", 1, 2),
        ("x = {\n    1: 2,\n    3: -4,\n}\n", 2, 2),
        ("x = [1, 2, y]\n", 1, 9),
    ],
)
def test_lines_and_tokens(source: str, lines: int, tokens: int) -> None:
    counted = house.density(source)
    assert counted.lines == lines
    assert counted.tokens == tokens


def test_density_counts_constructions() -> None:
    counted = house.density("a, b = c, d\na, b = f()\nx = 1 if a else 2\n")
    assert counted.parallel == 1
    assert counted.conditional == 1
    assert counted.per_thousand_lines(counted.parallel) == pytest.approx(1000 / 3)


# ---------------------------------------------------------------- idioms and names


def test_no_forbidden_idiom() -> None:
    assert_none(offences_of(house.forbidden_idioms, FILES))


@pytest.mark.parametrize(
    "line",
    [
        "a.append(1) if a else None",
        "x = [bos] * (bos is not None)",
        "x = ', dropped' * bool(dropped)",
        "x = 2 * (a > b)",
        "x = (a == b) * [file]",
        "x = f'{a}' * (a != b)",
        "x = files * (not done)",
        "x = files * (a and b)",
        "x = files * (name in names)",
        "x = 'a b c'.split()",
        "x = 'a,b,c'.split(',')",
    ],
)
def test_a_forbidden_idiom_is_seen(line: str) -> None:
    assert house.forbidden_idioms("a.py", line)


@pytest.mark.parametrize("line", ["x = losses * (rewards > 0)", "x = 1 if a else 2", "x = text.split()", "x = [0] * n"])
def test_other_expressions_are_allowed(line: str) -> None:
    assert not house.forbidden_idioms("a.py", line)


def test_variables_have_names() -> None:
    assert_none(offences_of(house.placeholder_names, CODE))


@pytest.mark.parametrize(
    "line",
    [
        "found = 1",
        "own: int = 1",
        "for one in x:\n    pass",
        "x = [some for some in y]",
        "x, (how, y) = z",
        "with x as found:\n    pass",
        "if found := f():\n    pass",
    ],
)
def test_a_placeholder_is_seen(line: str) -> None:
    assert house.placeholder_names("a.py", line)


def test_reading_and_attributes_are_allowed() -> None:
    assert not house.placeholder_names("a.py", "x.found = own\nx = f(one=some)")


# ---------------------------------------------------------------- help texts


def test_every_argument_has_a_help_text() -> None:
    names: set[str] = set()
    for source in CODE.values():
        names |= house.argument_classes(source)
    for source in CODE.values():
        names |= house.base_classes(source, names)
    assert names >= {"Args", "Sampling"}
    assert_none(offences_of(house.poor_help_texts, CODE, names))


def test_the_classes_behind_a_command_line() -> None:
    source = "class Score(Base):\n    pass\n\ncommand(main, Score | Judge)\nprint(other, Other)\n"
    assert house.argument_classes(source) == {"Score", "Judge"}
    assert house.base_classes(source, {"Score", "Judge"}) == {"Base"}


@pytest.mark.parametrize(
    "body",
    [
        "beta: float",
        "beta: float\n    lam: float\n    'weight of the regulariser'",
        "beta: float\n    'the strength'",
        "beta: float\n    '0 is the smallest value'",
        "beta: float\n    'how far the policy may go.'",
    ],
)
def test_a_poor_help_text_is_seen(body: str) -> None:
    assert len(house.poor_help_texts("a.py", f"class Args:\n    {body}\n", {"Args"})) == 1


def test_a_help_text_and_other_classes_are_allowed() -> None:
    source = "class Args:\n    beta: float\n    'reward per nat of log-ratio'\n\nclass Point:\n    x: int\n"
    assert not house.poor_help_texts("a.py", source, {"Args"})


# ---------------------------------------------------------------- documentation


@pytest.mark.parametrize("page", PAGES)
def test_the_files_of_the_documentation_exist(page: str) -> None:
    text = PAGES[page]
    paths = house.named_paths(text) | house.listed_modules(text)
    assert_none(path for path in sorted(paths) if not (tiny.ROOT / path).exists())


def test_the_paths_on_a_page() -> None:
    text = "See [`dpo`](algos/dpo.py), `scripts/lab/notices.py` and docs/reliability.md; not trl/scripts/dpo.py.\n"
    assert house.named_paths(text) == {"algos/dpo.py", "scripts/lab/notices.py", "docs/reliability.md"}
    table = "algos/      one file per algorithm\nshared/     rows · groups\n"
    assert house.listed_modules(table) == {"shared/rows.py", "shared/groups.py"}
