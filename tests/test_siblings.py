"""What differs between two files of `algos/` is the paper: relative tests, with no snapshot of any file."""

import ast
import difflib
import re

import pytest
import tiny

ALGOS = {path.stem: path.read_text(encoding="utf-8") for path in sorted((tiny.ROOT / "algos").glob("[a-z]*.py"))}
SHARED = "\n".join(path.read_text(encoding="utf-8") for path in sorted((tiny.ROOT / "shared").glob("*.py")))
# changed lines, both sides, to the nearest sibling
BUDGETS = dict(ipo=20, distill_dpo=20, typo=24, exo=32, pessimistic_dpo=36, ensemble_dpo=42, rm=26, sft=26)
OWN = {"Args", "objective", "main"}  # what each file has in a form of its own
LINES, LONGER, FUNCTION = 180, {"token_dpo_beam": 300}, 45


def body(source: str) -> list[str]:
    """The lines without the module's docstring."""
    first = ast.parse(source).body[0]
    assert isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant), "no module docstring"
    return source.splitlines()[first.end_lineno :]


def changes(ours: str, theirs: str) -> list[str]:
    """The lines of a diff that are on one side only."""
    lines = list(difflib.unified_diff(body(theirs), body(ours), lineterm="", n=0))[2:]  # the names of both sides
    return [line for line in lines if line[0] in "+-"]


def fields(source: str) -> dict[str, tuple[str, str | None, str]]:
    """The fields of Args: annotation, default, docstring."""
    (arguments,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    found, rest = {}, arguments.body
    for node, after in zip(rest, [*rest[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), f"{node.target.id}: no words"
            default = ast.unparse(node.value) if node.value else None
            found[node.target.id] = (ast.unparse(node.annotation), default, after.value.value)
    return found


def definitions(source: str) -> dict[str, str]:
    """The text of each top-level function and class, decorators included."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[start - 1 : node.end_lineno])
    return found


def test_the_family_is_here() -> None:
    assert set(BUDGETS) | {"dpo"} <= set(ALGOS)


@pytest.mark.parametrize("name", BUDGETS)
def test_close_to_the_nearest_sibling(name: str) -> None:
    diffs = {other: changes(ALGOS[name], source) for other, source in ALGOS.items() if other != name}
    nearest = min(diffs, key=lambda other: len(diffs[other]))
    found = diffs[nearest]
    shown = "\n".join(found)
    assert len(found) <= BUDGETS[name], f"{name}: {len(found)} changed lines to {nearest}, {BUDGETS[name]}\n{shown}"


@pytest.mark.parametrize("name", ALGOS)
def test_short_files_of_short_functions(name: str) -> None:
    limit, source = LONGER.get(name, LINES), ALGOS[name]
    assert len(source.splitlines()) <= limit
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= FUNCTION
    }
    assert not long, f"functions over {FUNCTION} lines: {long}"


def test_a_definition_of_one_name_has_one_text() -> None:
    texts: dict[str, dict[str, list[str]]] = {}
    for name, source in ALGOS.items():
        for definition, text in definitions(source).items():
            texts.setdefault(definition, {}).setdefault(text, []).append(name)
    shared = {definition for definition, found in texts.items() if sum(map(len, found.values())) > 1} - OWN
    assert shared, "no definition stands in two files"
    differ = {definition: list(texts[definition].values()) for definition in shared if len(texts[definition]) > 1}
    assert not differ, f"texts of one name differ between files: {differ}"


def test_an_argument_of_one_name_has_one_meaning() -> None:
    found: dict[str, dict[tuple, list[str]]] = {}
    for name, source in ALGOS.items():
        for argument, (annotation, default, words) in fields(source).items():
            value = None if argument == "learning_rate" else default
            found.setdefault(argument, {}).setdefault((annotation, value, words), []).append(name)
    differ = {argument: meanings for argument, meanings in found.items() if len(meanings) > 1}
    assert not differ, f"type, default or words differ between files: {differ}"


@pytest.mark.parametrize("name", ALGOS)
def test_every_argument_is_read(name: str) -> None:
    """`args.name` in the file or in `shared/`; a list of names to check or to print does not count."""
    arguments = fields(ALGOS[name])
    assert len(arguments) <= 32
    code = "\n".join([*body(ALGOS[name]), SHARED])
    unread = [argument for argument in arguments if not re.search(rf"\bargs\.{argument}\b", code)]
    assert not unread


def imports(name: str, package: str) -> set[str]:
    """The modules of one package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(ALGOS[name])):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {module for module in modules if module.partition(".")[0] == package}
    return found


@pytest.mark.parametrize("name", ALGOS)
def test_no_algorithm_imports_another(name: str) -> None:
    assert not imports(name, "algos")
    assert imports(name, "shared")
