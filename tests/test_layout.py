"""The house keeps its order: which room may import which, how long a file is, and what the code never does.

The rules are the tables below; the sources are read with ast and tokenize and never imported. A new folder in
src/kitout must be given its floor in `FLOORS` before anything passes, and a floor without a room fails too.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src"
FILES = sorted(ROOT.rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]
MOST_LINES = 350
MOST_FILES = 14  # the files of one folder, besides its __init__
DOCSTRING_LINES = range(3, 9)

# Imports go downwards only: a file imports from its own room and from rooms on floors below, never beside or above.
# A room is a folder or a top-level module of src/kitout. `kitout/__init__.py` stands outside: it imports nothing.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("demo",),
    ("compare", "doctor", "export", "search"),
    ("align",),
    ("assess", "interop", "predict"),
    ("train",),
    ("evaluate",),
    ("fuse", "trunk"),
    ("model_check", "peft_folders", "signals"),
    ("kit",),
    ("files",),
    ("runtime", "methods"),
    ("method",),
    ("delta",),
    ("data", "assets", "base", "route"),
    ("device_constants", "errors", "fast", "format", "install_hint", "no_booleans", "tensor_version", "version"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Rooms that use kitout as its users do, through the public names.
USERS = ("cli", "demo")

# A method sees the contract, a site, how to choose sites and how to read a weight: nothing of kits, routes or files.
# Besides these it may use other modules of its folder that register no method: Deltas that methods share.
MODULES_FOR_METHODS = {
    "kitout.device_constants",
    "kitout.errors",
    "kitout.fast",
    "kitout.tensor_version",
    "kitout.delta",
    "kitout.method",
    "kitout.base.find.parameters",
    "kitout.base.select",
    "kitout.base.site",
    "kitout.base.survey",
    "kitout.base.weights",
    "kitout.route",
}

# Roles come from structure: no file that finds sites or runs adapters may name an architecture in its code.
ARCHITECTURES = re.compile(
    r"(?i)(?<![a-z])(albert|bart|beit|(distil|mobile|modern|ro|xlm[-_]?ro|camem|de)?berta?|blenderbot|bloom|cohere"
    r"|convnext|dbrx|deepseek|deit|dinov?\d?|electra|eva0?2|falcon|gemma\d?|glm\d?|gpt|gpt[-_]?[2j]|gpt[-_]?neox?|granite"
    r"|hubert|jamba|llama\d?|mamba|mistral|mixtral|mpt|olmo\d?|phi[34]|pythia|qwen\d?|smollm\d?|stablelm|starcoder\d?"
    r"|swinv?2?|t5|umt5|vit|wav2vec2?|whisper|xglm|xlnet)(?![a-z])"
)
NAMELESS = ("base", "delta", "kit", "method", "methods", "runtime")

# Words of an older private diction, each replaced by the field's own: active, installed, trained on, split, pad token.
REFUSED_WORDS = {
    "worn", "wear", "wears", "wearing", "told", "laid", "beneath", "faulty", "learnt", "gist", "filler", "commonest",
    "parted",
}  # fmt: skip
# Files of one name below one room, where the folder completes the name.
SAME_NAMES = {("runtime", "compile.py")}  # routing: a route; virtual_tokens: the virtual tokens of a route

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


@dataclass(frozen=True)
class Import:
    module: str
    line: int


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """kitout.base.site -> base; kitout.errors -> errors; kitout -> ''."""
    return [*module.split("."), ""][1]


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> list[Import]:
    """Every import of the file, wherever it stands; `from package import module` counts as an import of the module."""
    return [
        Import(name, node.lineno)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in _imported(node, path)
    ]


def _imported(node: ast.AST, path: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        source = _absolute(node, path)
        for alias in node.names:
            below = f"{source}.{alias.name}"
            yield below if below in MODULES else source


def _absolute(node: ast.ImportFrom, path: Path) -> str:
    if not node.level:
        return node.module or ""
    package = list(path.relative_to(ROOT).parts[:-1])
    return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def internal(path: Path) -> list[Import]:
    return [i for i in imports(path) if i.module.split(".")[0] == "kitout"]


@pytest.fixture(params=FILES, ids=IDS)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_imports_go_downwards(path: Path) -> None:
    here = module_name(path)
    own = room(here)
    if own == "":
        assert not internal(path), "the public names are a table of strings"
        return
    assert own in FLOOR, f"{own!r} is a new room: give it its floor in FLOORS"
    upwards = [
        f"line {i.line}: {here} imports {i.module}" for i in internal(path) if not _may_import(own, room(i.module))
    ]
    assert not upwards, f"{own} may import from the floors below {FLOORS[FLOOR[own]]}\n" + "\n".join(upwards)


def _may_import(own: str, other: str) -> bool:
    if other == "":
        return own in USERS
    return own == other or FLOOR[own] < FLOOR.get(other, -1)


def test_every_room_on_the_list_exists() -> None:
    rooms = {room(name) for name in MODULES} - {""}
    assert set(FLOOR) == rooms


def test_a_method_knows_only_the_contract(path: Path) -> None:
    here = module_name(path)
    if room(here) != "methods" or path.name == "__init__.py":
        pytest.skip("not a method")
    composes = path.parent.name == "compositions"  # those are made of methods
    forbidden = [
        f"line {i.line}: {here} imports {i.module}"
        for i in internal(path)
        if i.module not in MODULES_FOR_METHODS
        and not (
            room(i.module) == "methods"
            and i.module in MODULES
            and (not _registers(MODULES[i.module]) or (composes and path.name != MODULES[i.module].name))
        )
    ]
    assert not forbidden, "\n".join(forbidden)


def _registers(path: Path) -> bool:
    classes = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef))
    return path.name == "__init__.py" or any("register" in map(ast.unparse, c.decorator_list) for c in classes)


def test_there_are_no_import_circles() -> None:
    """Counting imports inside functions and below TYPE_CHECKING: two files that need each other are one thing."""
    edges = {name: {i.module for i in internal(file)} for name, file in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "import circle: " + " -> ".join([*trail[trail.index(name) :], name])
        if name in done:
            return
        for other in sorted(edges.get(name, set()) - {name}):
            visit(other, (*trail, name))
        done.add(name)

    for name in sorted(edges):
        visit(name, ())


def test_a_folder_holds_about_a_dozen_files() -> None:
    folders = {path.parent for path in FILES}
    sizes = {
        str(folder.relative_to(ROOT)): sum(path.name != "__init__.py" for path in folder.glob("*.py"))
        for folder in folders
    }
    assert not {folder: size for folder, size in sizes.items() if size > MOST_FILES}


def test_class_names_are_unique() -> None:
    """One word, one thing: a reader who searches for a class finds one."""
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    repeated = [f"{name}: {', '.join(lines)}" for name, lines in sorted(places.items()) if len(lines) > 1]
    assert not repeated, "\n".join(repeated)


def test_no_file_name_twice_below_a_room() -> None:
    places: dict[tuple[str, str], list[str]] = {}
    for name, path in MODULES.items():
        if path.name != "__init__.py":
            places.setdefault((room(name), path.name), []).append(str(path.relative_to(ROOT)))
    repeated = {key: paths for key, paths in places.items() if len(paths) > 1}
    assert set(repeated) == SAME_NAMES, repeated


def test_imports_inside_are_real(path: Path) -> None:
    missing = [f"line {i.line}: {i.module}" for i in internal(path) if i.module not in MODULES]
    assert not missing, "\n".join(missing)


def test_opens_with_a_docstring(path: Path) -> None:
    text = ast.get_docstring(tree_of(path)) or ""
    lines = len(text.splitlines())
    if path.name == "__init__.py":
        assert text, "a folder says in a phrase what it holds"
        return
    assert lines in DOCSTRING_LINES, f"{lines} lines; say in 3 to 8 what it is and what it does not know"


def test_fits_on_a_few_screens(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines: find the two things it is and split them"


def test_never_runs_what_it_reads(path: Path) -> None:
    """No pickle by any name, no eval or exec, no code taken from a model folder."""
    errors = [f"line {i.line}: imports {i.module}" for i in imports(path) if i.module.split(".")[0] in UNSAFE_MODULES]
    for node in ast.walk(tree_of(path)):
        name = _unsafe_name(node)
        if name:
            errors.append(f"line {getattr(node, 'lineno', '?')}: {name}")
    assert not errors, "\n".join(errors)


def _unsafe_name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
        return node.func.id
    if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
        return "torch.load"
    if isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "load" for a in node.names):
        return "torch.load"
    if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and not _is_false(node.value):
        return "trust_remote_code"
    if isinstance(node, ast.Dict) and any(
        isinstance(k, ast.Constant) and k.value == "trust_remote_code" and not _is_false(v)
        for k, v in zip(node.keys, node.values, strict=True)
    ):
        return "trust_remote_code"
    if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and not _is_false(node.value):
        return "allow_pickle"
    return None


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_names_no_architecture(path: Path) -> None:
    if room(module_name(path)) not in NAMELESS:
        pytest.skip("only what finds sites and runs adapters is nameless")
    lines = [f"line {line}: {text.strip()}" for line, text in _code_words(path) if _names_architecture(text)]
    assert not lines, "\n".join(lines)


def _names_architecture(text: str) -> bool:
    """As it stands, and with CamelCase split: BertModel names one."""
    snake_case = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text)
    return any(ARCHITECTURES.search(form) for form in (text, snake_case))


def _code_words(path: Path) -> Iterator[tuple[int, str]]:
    """Names and strings of the file with their lines, docstrings and comments left out."""
    with_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstring_lines = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, with_docstring) and ast.get_docstring(node) is not None:
            docstring_lines.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        in_docstring = token.type == tokenize.STRING and token.start[0] in docstring_lines
        if token.type != tokenize.COMMENT and not in_docstring:
            yield token.start[0], token.string


@pytest.mark.parametrize(
    ("text", "expected"),
    [(word, True) for word in ["bert", "BertModel", "vit", "gpt_neox", "t5", "llama3", "deberta", "Qwen3", "model.vit"]]
    + [(word, False) for word in ["adapt", "VPT", "AdaptFormer", "attn.qkv", "invite", "optimizer", "opt", "silicon"]],
)
def test_the_name_rule_itself(text: str, expected: bool) -> None:
    assert _names_architecture(text) == expected


TEXTS = [
    *sorted(file for suffix in ("*.py", "*.pyi", "*.html") for file in ROOT.rglob(suffix)),
    *sorted(ROOT.parent.glob("*.md")),
    *sorted((ROOT.parent / "docs").glob("*.md")),
]


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT.parent)))
def test_speaks_the_words_of_the_field(file: Path) -> None:
    """Identifiers, strings, docstrings and comments alike, and the pages."""
    lines = enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
    refused = [f"line {number}: {word}" for number, line in lines for word in _words(line) if word in REFUSED_WORDS]
    assert not refused, "\n".join(refused)


def _words(text: str) -> list[str]:
    """The words of a text in lower case, snake_case and CamelCase split."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)]


def test_the_word_rule_itself() -> None:
    assert _words("was_worn WornHandle, isWorn WORN4 untold") == [
        "was", "worn", "worn", "handle", "is", "worn", "worn", "untold",
    ]  # fmt: skip
