"""What differs between two files of `algos/` is the paper: relative tests, with no snapshot of any file.

The example of a fork, scripts/baselines/unlikelihood.py, is held to the same rules.
"""

import ast
import difflib
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import tiny

FORK = tiny.ROOT / "scripts" / "baselines" / "unlikelihood.py"  # the documentation's example of a fork
ALGOS = {path.stem: path.read_text(encoding="utf-8") for path in sorted((tiny.ROOT / "algos").glob("[a-z]*.py"))}
FAMILY = {**ALGOS, FORK.stem: FORK.read_text(encoding="utf-8")}
SHARED = "\n".join(path.read_text(encoding="utf-8") for path in sorted((tiny.ROOT / "shared").glob("*.py")))
BUDGETS = {  # changed lines, both sides, to the nearest sibling
    "ipo": 20,
    "unlikelihood": 24,
    "distill_dpo": 20,
    "typo": 30,
    "exo": 32,
    "sft": 32,
    "rm": 32,
    "pessimistic_dpo": 42,
    "ensemble_dpo": 54,
}
FREE = {"Args", "objective", "main"}  # definitions that each file has in a form of its own
MOST_ARGUMENTS = 35
MOST_LINES = 200
MOST_LINES_WITH_BEAM_SEARCH = 320


class Argument(NamedTuple):
    """A field of Args."""

    annotation: str
    default: str | None
    words: str


# ---------------------------------------------------------------- sources


def without_docstring(source: str) -> str:
    first = ast.parse(source).body[0]
    assert isinstance(first, ast.Expr), "no module docstring"
    assert isinstance(first.value, ast.Constant), "no module docstring"
    lines = source.splitlines()[first.end_lineno :]
    return "\n".join(lines)


def code_lines(source: str) -> list[str]:
    """The lines without the module's docstring, blank lines and lines of comment."""
    code = []
    for line in without_docstring(source).splitlines():
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            code.append(line)
    return code


def changes(ours: str, theirs: str) -> list[str]:
    """The lines of a diff that are on one side only."""
    diff = difflib.unified_diff(code_lines(theirs), code_lines(ours), lineterm="", n=0)
    lines = list(diff)[2:]  # without the names of both sides
    return [line for line in lines if line[0] in "+-"]


def arguments(source: str) -> dict[str, Argument]:
    """The fields of Args by name. Each must have a docstring."""
    (args,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    fields = {}
    for node, following in zip(args.body, [*args.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign):
            continue
        name = ast.unparse(node.target)
        default = None
        if node.value is not None:
            default = ast.unparse(node.value)
        assert isinstance(following, ast.Expr), f"{name}: no words"
        fields[name] = Argument(ast.unparse(node.annotation), default, ast.literal_eval(following.value))
    return fields


def definitions(source: str) -> dict[str, str]:
    """The text of each top-level function and class, decorators included."""
    lines = source.splitlines()
    texts = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            starts = [node.lineno, *(decorator.lineno for decorator in node.decorator_list)]
            texts[node.name] = "\n".join(lines[min(starts) - 1 : node.end_lineno])
    return texts


# ---------------------------------------------------------------- distances


def test_the_family_is_here() -> None:
    assert set(BUDGETS) | {"dpo"} <= set(FAMILY)


@pytest.mark.parametrize("name", BUDGETS)
def test_close_to_the_nearest_sibling(name: str) -> None:
    siblings = {sibling: changes(FAMILY[name], source) for sibling, source in ALGOS.items() if sibling != name}
    nearest = min(siblings, key=lambda sibling: len(siblings[sibling]))
    diff = siblings[nearest]
    budget = BUDGETS[name]
    shown = "\n".join(diff)
    assert len(diff) <= budget, f"{name}: {len(diff)} changed lines to {nearest}, over {budget}\n{shown}"


def test_a_change_of_one_file_counts_on_both_sides() -> None:
    source = ALGOS["dpo"]
    changed = source.replace("run.save(step, model, optimizer)", "run.save(step, model)")
    assert changes(changed, source) == [
        "-        run.save(step, model, optimizer)",
        "+        run.save(step, model)",
    ]


def test_comments_blank_lines_and_the_docstring_do_not_count() -> None:
    source = ALGOS["dpo"]
    changed = source.replace("        run.save(", "\n        # why\n        run.save(")
    changed = changed.replace("Direct Preference Optimization", "An algorithm")
    assert changed != source
    assert changes(changed, source) == []


@pytest.mark.parametrize("name", FAMILY)
def test_short_files(name: str) -> None:
    limit = MOST_LINES
    if name == "token_dpo_beam":
        limit = MOST_LINES_WITH_BEAM_SEARCH
    assert len(FAMILY[name].splitlines()) <= limit


# ---------------------------------------------------------------- one name, one meaning


def test_a_definition_of_one_name_has_one_text() -> None:
    files_of: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file, source in FAMILY.items():
        for name, text in definitions(source).items():
            if name not in FREE:
                files_of[name][text].append(file)

    in_two_files = [name for name, texts in files_of.items() if sum(map(len, texts.values())) > 1]
    assert in_two_files, "no definition stands in two files"
    different = {name: list(texts.values()) for name, texts in files_of.items() if len(texts) > 1}
    assert not different, f"texts of one name differ between files: {different}"


def test_an_argument_of_one_name_has_one_meaning() -> None:
    """But for the default of the learning rate."""
    files_of: dict[str, dict[Argument, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file, source in FAMILY.items():
        for name, argument in arguments(source).items():
            if name == "learning_rate":
                argument = argument._replace(default=None)
            files_of[name][argument].append(file)

    different = {name: dict(meanings) for name, meanings in files_of.items() if len(meanings) > 1}
    assert not different, f"type, default or words differ between files: {different}"


@pytest.mark.parametrize("name", FAMILY)
def test_every_argument_is_read(name: str) -> None:
    """`args.name` in the file or in `shared/`; a list of names to check or to print does not count."""
    names = arguments(FAMILY[name])
    assert len(names) <= MOST_ARGUMENTS
    code = without_docstring(FAMILY[name]) + SHARED
    unread = [argument for argument in names if not re.search(rf"\bargs\.{argument}\b", code)]
    assert not unread


# ---------------------------------------------------------------- imports


def imported_modules(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name


@pytest.mark.parametrize("name", FAMILY)
def test_no_algorithm_imports_another(name: str) -> None:
    packages = {module.partition(".")[0] for module in imported_modules(FAMILY[name])}
    assert "algos" not in packages
    assert "shared" in packages
