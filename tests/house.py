"""The rules of the house, as functions over source text. Each gives what breaks its rule, one string per place."""

import ast
import fnmatch
import functools
import graphlib
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith)
CONTAINERS = (ast.List, ast.Tuple, ast.Set, ast.Dict)


@functools.cache
def parse(source: str) -> ast.Module:
    return ast.parse(source)


@functools.cache
def all_nodes(source: str) -> list[ast.AST]:
    return list(ast.walk(parse(source)))


# ---------------------------------------------------------------- imports

ALLOWED_IMPORTS = {  # room → modules of the house that its files may import
    "shared": ["shared", "shared.*"],
    "algos": ["shared", "shared.*"],
    "scripts/lab": ["scripts.lab", "scripts.lab.*", "algos.*", "shared", "shared.*"],
    "scripts": ["scripts.lab.*", "algos.*", "shared", "shared.*"],
    "scripts/papers": ["scripts.papers", "scripts.lab.*", "algos.*", "shared", "shared.*"],
    "scripts/baselines": ["scripts.lab.*", "algos.*", "shared", "shared.*"],
    "scripts/experiments": ["scripts.lab.*", "algos.*", "shared", "shared.*"],
}
STARTS_PAPERS = "scripts/bandits.py"  # the command that runs the papers' files together
HEAVY = ["transformers", "datasets", "matplotlib", "peft", "torch.distributed.fsdp"]


class Import(NamedTuple):
    """`from shared.files import fsync` imports "shared.files.fsync", which may be a module or a name in one."""

    line: int
    name: str
    time: Literal["load", "call", "type check"]


Graph = dict[str, set[str]]  # module → the modules that it imports


def room_of(path: str) -> str:
    """The folder of a file: "scripts/lab" of scripts/lab/notices.py."""
    return path.rpartition("/")[0]


def module_of(path: str) -> str:
    """The dotted name of a file: "scripts.papers" of scripts/papers/__init__.py, "tiny" of tests/tiny.py."""
    if path.startswith("tests/"):
        path = path.rpartition("/")[2]
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def imports(source: str) -> list[Import]:
    return list(_imports_in(parse(source), "load"))


def _imports_in(node: ast.AST, time: Literal["load", "call", "type check"]) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(child.lineno, alias.name, time)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            for alias in child.names:
                yield Import(child.lineno, f"{module}.{alias.name}", time)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports_in(child, "type check")
        elif isinstance(child, FUNCTIONS):
            yield from _imports_in(child, "call")
        else:
            yield from _imports_in(child, time)


def imported_module(name: str, modules: Iterable[str]) -> str | None:
    """The module of the house behind an imported name, or None for one of another package."""
    while name:
        if name in modules:
            return name
        name = name.rpartition(".")[0]
    return None


def imports_upward(path: str, source: str, paths: Iterable[str]) -> list[str]:
    """Imports of files that do not lie below this one."""
    allowed = list(ALLOWED_IMPORTS[room_of(path)])
    if path == STARTS_PAPERS:
        allowed += ["scripts.papers", "scripts.papers.*"]
    modules = {module_of(other) for other in paths}
    modules |= {module.removeprefix("scripts.") for module in modules}  # a command finds its neighbours by both names

    offences = []
    for line, name, _ in imports(source):
        module = imported_module(name, modules)
        if name.startswith("."):
            offences.append(f"{path}:{line}: relative import of {name}")
        elif module is not None and not any(fnmatch.fnmatchcase(module, pattern) for pattern in allowed):
            offences.append(f"{path}:{line}: {module}")
    return offences


def import_graph(files: dict[str, str], times: Iterable[str]) -> Graph:
    """Which module of the files imports which, at these times."""
    modules = {module_of(path) for path in files}
    graph: Graph = {}
    for path, source in files.items():
        importer = module_of(path)
        graph[importer] = set()
        for _, name, time in imports(source):
            module = imported_module(name, modules)
            if module is not None and module != importer and time in times:
                graph[importer].add(module)
    return graph


def circle(graph: Graph) -> list[str]:
    """Modules of which each imports the next, and the last one the first; empty if there are none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def reachable(start: str, graph: Graph) -> set[str]:
    """All modules that importing one of them loads."""
    loaded: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module not in loaded:
            loaded.add(module)
            waiting += graph[module]
    return loaded


def _is_or_is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def heavy_imports(path: str, source: str) -> list[str]:
    """Imports, whenever the file is loaded, of packages that take long."""
    offences = []
    for line, name, time in imports(source):
        if time == "load" and any(_is_or_is_in(name, package) for package in HEAVY):
            offences.append(f"{path}:{line}: {name}")
    return offences


def mocks(path: str, source: str) -> list[str]:
    return [f"{path}:{line}: {name}" for line, name, _ in imports(source) if _is_or_is_in(name, "unittest.mock")]


# ---------------------------------------------------------------- functions


def function_lengths(path: str, source: str) -> dict[str, int]:
    """The lines of each function, by its place and name."""
    lengths = {}
    for node in all_nodes(source):
        if isinstance(node, FUNCTIONS):
            assert node.end_lineno is not None
            lengths[f"{path}:{node.lineno}: {node.name}"] = node.end_lineno - node.lineno + 1
    return lengths


def function_nesting(path: str, source: str) -> dict[str, int]:
    """How deep statements are nested in each function, by its place and name."""
    depths = {}
    for node in all_nodes(source):
        if isinstance(node, FUNCTIONS):
            depths[f"{path}:{node.lineno}: {node.name}"] = _depth(node)
    return depths


def _depth(node: ast.AST) -> int:
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.Lambda)):
            continue
        depth = _depth(child)
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        if isinstance(child, BLOCKS) and not is_elif:
            depth += 1
        deepest = max(deepest, depth)
    return deepest


# ---------------------------------------------------------------- density


class Density(NamedTuple):
    """Counts of one file or of many."""

    lines: int  # of code
    tokens: int  # names, operators, numbers
    parallel: int  # assignments of several values to several names
    conditional: int  # expressions with `if`

    @property
    def tokens_per_line(self) -> float:
        return self.tokens / max(1, self.lines)

    def per_thousand_lines(self, count: int) -> float:
        return 1000 * count / max(1, self.lines)


@functools.cache
def density(source: str) -> Density:
    """Blank lines, comments, docstrings and the insides of tables of constants do not count."""
    nodes = all_nodes(source)
    tables = [node for node in nodes if isinstance(node, CONTAINERS) and _is_table(node)]

    code = _code_lines(source, nodes)
    for table in tables:
        code -= set(range(table.lineno + 1, table.end_lineno or 0))
    tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (tokenize.NAME, tokenize.OP, tokenize.NUMBER):
            continue
        if token.start[0] in code and not any(_holds(table, token.start) for table in tables):
            tokens += 1

    parallel = sum(isinstance(node, ast.Assign) and _is_parallel(node) for node in nodes)
    conditional = sum(isinstance(node, ast.IfExp) for node in nodes)
    return Density(len(code), tokens, parallel, conditional)


def total_density(densities: Iterable[Density]) -> Density:
    return Density(*(sum(counts) for counts in zip(*densities, strict=True)))


def _code_lines(source: str, nodes: list[ast.AST]) -> set[int]:
    code = set()
    for number, line in enumerate(source.splitlines(), 1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            code.add(number)
    for node in nodes:
        if isinstance(node, ast.Expr) and _is_text(node.value):
            code -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return code


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_parallel(node: ast.Assign) -> bool:
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def _is_table(node: ast.expr) -> bool:
    constants = sum(isinstance(inner, ast.Constant) for inner in ast.walk(node))
    return constants >= 3 and _is_constant(node)


def _is_constant(node: ast.AST) -> bool:
    if isinstance(node, ast.Dict):
        keys = [key for key in node.keys if key is not None]
        return all(_is_constant(inner) for inner in [*keys, *node.values])
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return all(_is_constant(element) for element in node.elts)
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.operand, ast.Constant)
    return isinstance(node, ast.Constant)


def _holds(node: ast.expr, position: tuple[int, int]) -> bool:
    start = (node.lineno, node.col_offset)
    end = (node.end_lineno or 0, node.end_col_offset or 0)
    return start <= position < end


# ---------------------------------------------------------------- idioms and names

PLACEHOLDERS = {"found", "own", "one", "some", "how"}


def forbidden_idioms(path: str, source: str) -> list[str]:
    """Expressions that save a line and cost the reader a thought."""
    offences = []
    for node in all_nodes(source):
        for idiom, is_meant in IDIOMS.items():
            if is_meant(node):
                offences.append(f"{path}:{node.lineno}: {idiom}: {ast.unparse(node)[:60]}")  # type: ignore[attr-defined]
    return offences


def _is_conditional_statement(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.IfExp)


def _is_product_with_truth(node: ast.AST) -> bool:
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        return False
    return _is_text_list_or_number(node.left, node.right) or _is_text_list_or_number(node.right, node.left)


def _is_text_list_or_number(value: ast.expr, factor: ast.expr) -> bool:
    """Whether `factor` is a truth value that is no tensor, or a comparison with something of Python as the other side.

    `losses * (rewards > 0)` with tensors is ordinary arithmetic.
    """
    if isinstance(factor, ast.Call):
        return ast.unparse(factor.func) == "bool"
    if isinstance(factor, ast.UnaryOp):
        return isinstance(factor.op, ast.Not)
    if isinstance(factor, ast.BoolOp):
        return True
    if not isinstance(factor, ast.Compare):
        return False
    if isinstance(factor.ops[0], ast.Is | ast.IsNot | ast.In | ast.NotIn):
        return True
    return isinstance(value, ast.Constant | ast.JoinedStr | ast.List | ast.Tuple | ast.ListComp)


def _is_split_literal(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    return node.func.attr == "split" and _is_text(node.func.value)


IDIOMS: dict[str, Callable[[ast.AST], bool]] = {
    "a conditional expression as a statement": _is_conditional_statement,
    "a product with a truth value": _is_product_with_truth,
    "a literal that is split": _is_split_literal,
}


def placeholder_names(path: str, source: str) -> list[str]:
    """Variables whose name says nothing."""
    offences = []
    for node in all_nodes(source):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in PLACEHOLDERS:
            offences.append(f"{path}:{node.lineno}: {node.id}")
    return offences


# ---------------------------------------------------------------- help texts


COMMANDS = ("command", "checked_command")


def argument_classes(source: str) -> set[str]:
    """The classes that `command(main, ...)` or `checked_command` reads from a command line."""
    names = set()
    for node in all_nodes(source):
        is_command = isinstance(node, ast.Call) and ast.unparse(node.func) in COMMANDS
        if is_command and len(node.args) == 2:
            classes = ast.walk(node.args[1])
            names |= {inner.id for inner in classes if isinstance(inner, ast.Name)}
    return names


def base_classes(source: str, names: set[str]) -> set[str]:
    """The classes that classes of these names inherit from."""
    bases = set()
    for node in all_nodes(source):
        if isinstance(node, ast.ClassDef) and node.name in names:
            bases |= {ast.unparse(base) for base in node.bases}
    return bases


def help_texts(source: str, names: set[str]) -> dict[str, str]:
    """The docstring of each field of classes of these names, or "" if there is none."""
    texts = {}
    for node in all_nodes(source):
        if not (isinstance(node, ast.ClassDef) and node.name in names):
            continue
        for field, following in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
            if isinstance(field, ast.AnnAssign):
                name = f"{field.lineno}: {node.name}.{ast.unparse(field.target)}"
                texts[name] = _text_of(following)
    return texts


def _text_of(statement: ast.stmt) -> str:
    if isinstance(statement, ast.Expr) and _is_text(statement.value):
        return ast.literal_eval(statement.value)
    return ""


def poor_help_texts(path: str, source: str, names: set[str]) -> list[str]:
    """Fields whose help text is missing or not a phrase of three words or more, from a letter to no full stop."""
    offences = []
    for field, text in help_texts(source, names).items():
        is_phrase = len(text.split()) > 2 and text[0].isalpha() and not text.endswith(".")
        if not is_phrase:
            offences.append(f"{path}:{field}: {text!r}")
    return offences


# ---------------------------------------------------------------- documentation


def named_paths(text: str) -> set[str]:
    """The files of the house that a page of documentation names."""
    return set(re.findall(r"(?<![\w/])(?:algos|shared|scripts|tests|docs)/[\w/-]+\.(?:py|sh|md)\b", text))


def listed_modules(text: str) -> set[str]:
    """The files behind lines such as `shared/     rows · groups · batches` in a table of folders."""
    paths = set()
    for folder, names in re.findall(r"^((?:algos|shared|scripts|tests)/) +(.* · .*)$", text, re.M):
        paths |= {f"{folder}{name.strip()}.py" for name in names.split("·")}
    return paths
