"""The house keeps its order: which room may import which, how long a file is, and what the code never does.

The rules are the tables below; the sources are read with ast and tokenize and never imported. A new folder in
src/kitout must be given its place in `MAY_IMPORT` before anything passes.
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
DOCSTRING_LINES = range(3, 9)

# Imports go downwards only. Left: a room (folder or top-level file); right: the other rooms it may import from.
# "" is kitout/__init__.py, the public names: only those who use kitout as a user does may import it.
BASE, KIT = {"errors", "base"}, {"errors", "base", "methods", "kit"}
FILES_AND_DATA = KIT | {"files", "data"}
WORK = FILES_AND_DATA | {"train", "evaluate"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "base": {"errors"},
    "methods": BASE | {"kit"},  # and there only MODULES_FOR_METHODS
    "kit": KIT,
    "files": KIT,
    "data": {"errors"},
    "train": FILES_AND_DATA | {"evaluate"},
    "evaluate": FILES_AND_DATA | {"train"},
    "serve": WORK,
    "demo": WORK | {"serve", ""},
    "cli": WORK | {"serve", "demo", ""},
    "__main__": {"cli"},
    "": KIT | {"files"},  # `import kitout` stays light
}

# A method sees the contract, a site, how to choose sites and how to read a weight: nothing of kits, routes or files.
# Besides these it may use other modules of its folder that register no method: parts that methods share.
MODULES_FOR_METHODS = {
    "kitout.errors",
    "kitout.kit.delta",
    "kitout.kit.method",
    "kitout.base.parameters",
    "kitout.base.survey",
    "kitout.base.site",
    "kitout.base.select",
    "kitout.base.weights",
}

# Edges that the tables forbid and a stated reason allows: {(importer, imported): reason}.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("kitout.kit.kit", "kitout.files.store"): "kit.save and kit.load are the contract; imported when they are called",
    ("kitout.train.machine", "kitout"): "a run says which version made it; imported when it is written",
    ("kitout.train.build", "kitout.demo.assets"): "embedded models and sets are found by name; imported when named",
    ("kitout.train.build", "kitout.demo.catalog"): "the names of the embedded ones",
    ("kitout.files.store", "kitout"): "a file says which version wrote it; imported when it is written",
}

# Roles come from structure: no file that finds, adds or wears parts may name an architecture in its code.
ARCHITECTURES = re.compile(
    r"(?i)(?<![a-z])(albert|bart|beit|(distil|mobile|modern|ro|xlm[-_]?ro|camem|de)?berta?|blenderbot|bloom|cohere"
    r"|convnext|dbrx|deepseek|deit|dinov?\d?|electra|eva0?2|falcon|gemma\d?|glm\d?|gpt|gpt[-_]?[2j]|gpt[-_]?neox?|granite"
    r"|hubert|jamba|llama\d?|mamba|mistral|mixtral|mpt|olmo\d?|phi[34]|pythia|qwen\d?|smollm\d?|stablelm|starcoder\d?"
    r"|swinv?2?|t5|umt5|vit|wav2vec2?|whisper|xglm|xlnet)(?![a-z])"
)
NAMELESS = ("base", "kit", "methods")

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    typing_only: bool  # below `if TYPE_CHECKING:`
    top_level: bool  # runs when the module is imported


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
    """Every import of the file; `from package import module` counts as an import of the module."""
    found: list[Import] = []

    def walk(node: ast.AST, typing_only: bool, top_level: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inner = top_level and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            found.extend(Import(name, child.lineno, typing_only, inner) for name in _imported(child, path))
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for statement in child.body:
                    walk(ast.Module([statement], []), True, inner)
                for statement in child.orelse:
                    walk(ast.Module([statement], []), typing_only, inner)
            else:
                walk(child, typing_only, inner)

    walk(tree_of(path), typing_only=False, top_level=True)
    return found


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
    assert room(here) in MAY_IMPORT, f"{room(here)!r} is a new room: give it its place in MAY_IMPORT"
    allowed = MAY_IMPORT[room(here)] | {room(here)}
    upwards = [
        f"line {i.line}: {here} imports {i.module}"
        for i in internal(path)
        if room(i.module) not in allowed and (here, i.module) not in EXCEPTIONS
    ]
    assert not upwards, f"allowed from here: {sorted(allowed)}\n" + "\n".join(upwards)


def test_a_method_knows_only_the_contract(path: Path) -> None:
    here = module_name(path)
    if room(here) != "methods" or path.name == "__init__.py":
        pytest.skip("not a method")
    strangers = [
        f"line {i.line}: {here} imports {i.module}"
        for i in internal(path)
        if not i.typing_only
        and i.module not in MODULES_FOR_METHODS
        and not (room(i.module) == "methods" and i.module in MODULES and not _registers(MODULES[i.module]))
        and (here, i.module) not in EXCEPTIONS
    ]
    assert not strangers, "\n".join(strangers)


def _registers(path: Path) -> bool:
    classes = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef))
    return path.name == "__init__.py" or any("register" in map(ast.unparse, c.decorator_list) for c in classes)


def test_there_are_no_import_cycles() -> None:
    edges = {
        name: {i.module for i in internal(file) if i.top_level and not i.typing_only} for name, file in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "import cycle: " + " -> ".join([*trail[trail.index(name) :], name])
        if name in done:
            return
        for other in sorted(edges.get(name, set()) - {name}):
            visit(other, (*trail, name))
        done.add(name)

    for name in sorted(edges):
        visit(name, ())


def test_imports_inside_are_real(path: Path) -> None:
    missing = [f"line {i.line}: {i.module}" for i in internal(path) if i.module not in MODULES]
    assert not missing, "\n".join(missing)


def test_opens_with_a_docstring(path: Path) -> None:
    text = ast.get_docstring(tree_of(path)) or ""
    lines = len(text.splitlines())
    assert lines in DOCSTRING_LINES, f"{lines} lines; say in 3 to 8 what it is and what it does not know"


def test_fits_on_a_few_screens(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines: find the two things it is and part them"


def test_never_runs_what_it_reads(path: Path) -> None:
    """No pickle in any dress, no eval or exec, no code taken from a model folder."""
    faults = [f"line {i.line}: imports {i.module}" for i in imports(path) if i.module.split(".")[0] in UNSAFE_MODULES]
    for node in ast.walk(tree_of(path)):
        fault = _unsafe(node)
        if fault:
            faults.append(f"line {getattr(node, 'lineno', '?')}: {fault}")
    assert not faults, "\n".join(faults)


def _unsafe(node: ast.AST) -> str | None:
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
        pytest.skip("only what finds, adds and wears parts is nameless")
    named = [f"line {line}: {text.strip()}" for line, text in _code_words(path) if _names_architecture(text)]
    assert not named, "\n".join(named)


def _names_architecture(text: str) -> bool:
    """As it stands, and with CamelCase parted: BertModel names one."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text)
    return any(ARCHITECTURES.search(form) for form in (text, parted))


def _code_words(path: Path) -> Iterator[tuple[int, str]]:
    """Names and strings of the file with their lines, docstrings and comments left out."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    prose = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            prose.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        skipped = token.type == tokenize.STRING and token.start[0] in prose
        if token.type != tokenize.COMMENT and not skipped:
            yield token.start[0], token.string


@pytest.mark.parametrize(
    ("text", "found"),
    [(word, True) for word in ["bert", "BertModel", "vit", "gpt_neox", "t5", "llama3", "deberta", "Qwen3", "model.vit"]]
    + [(word, False) for word in ["adapt", "VPT", "AdaptFormer", "attn.qkv", "invite", "optimiser", "opt", "silicon"]],
)
def test_the_name_rule_itself(text: str, found: bool) -> None:
    assert _names_architecture(text) == found


def test_every_exception_is_used_and_argued() -> None:
    edges = {(name, i.module) for name, file in MODULES.items() for i in internal(file)}
    assert not [edge for edge in EXCEPTIONS if edge not in edges]
    assert all(EXCEPTIONS.values())
    eager = {(name, i.module) for name, file in MODULES.items() for i in internal(file) if i.top_level}
    assert not eager & EXCEPTIONS.keys(), "an import upwards happens inside the function that needs it"
