"""Small faults for a mutation run: what to change in a line of the source, kind by kind."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from support.paths import ROOT

SOURCE = ROOT / "src/syncbn"
ROOMS = ("comm", "kernels", "numerics", "step")
NOTHING = "<module>"  # the function of what runs at import
SWAPS = {
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift},
}


@dataclass(frozen=True)
class Mutant:
    """One fault: bytes start to end of a file become ``new``."""

    file: str
    line: int
    start: int
    end: int
    function: str  # which the line belongs to
    text: str  # of the function
    context: str  # the line
    old: str
    new: str

    @property
    def key(self) -> tuple[str, ...]:
        """What stays when other lines of the file move."""
        return self.file, self.context, self.old, self.new

    @property
    def room(self) -> str:
        return self.file.partition("/")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.context}: {self.old} → {self.new}"


def mutants_of(file: str) -> list[Mutant]:
    data = (SOURCE / file).read_bytes()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    names, lines = functions_by_line(file), data.decode().splitlines()
    texts = {
        name: "\n".join(line for line, owner in zip(lines, names, strict=True) if owner == name)
        for name in names
    }
    found = []
    for node, new in _faults(ast.parse(data)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        name, context = names[node.lineno - 1], lines[node.lineno - 1].strip()
        old = " ".join(data[start:end].decode().split())
        if old != new:
            place = (file, node.lineno, start, end)
            found.append(Mutant(*place, name, texts[name], context, old, new))
    return found


def _faults(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """What to replace, and by what. Not in texts, annotations, or what only type checkers run."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_comment", "bases", "keywords"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_left_alone(child):
                yield from _faults_here(child)
                if not isinstance(child, ast.Raise):
                    yield from _faults(child)
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg != "strict" and not _is_left_alone(keyword.value):
                yield from _faults_here(keyword.value)
                yield from _faults(keyword.value)


def _is_left_alone(node: ast.AST) -> bool:
    text = ast.unparse(node) if isinstance(node, (ast.If, ast.Assign)) else ""
    return (
        isinstance(node, (ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom))
        or text.startswith(("if TYPE_CHECKING", "__all__"))
        or (isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn")
    )


def _faults_here(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    match node:
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield node, str(value + 1)
        case ast.Compare() | ast.BinOp() | ast.BoolOp() | ast.UnaryOp():
            yield from _other_operators(node)
        case ast.If(test=test) | ast.IfExp(test=test):
            yield from ((test, "True"), (test, "False"))
        case ast.While(test=test):
            yield test, "False"
        case ast.comprehension(ifs=[*tests]):
            yield from ((test, "True") for test in tests)
        case ast.Return(value=ast.expr() as value):
            yield value, "None"
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Delete() | ast.Break() | ast.Continue():
            yield node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, "pass"
        case ast.AugAssign(op=op) if type(op) in SWAPS:
            yield node, ast.unparse(_with(node, op=SWAPS[type(op)]()))
        case ast.Call(keywords=[*given]):
            for keyword in given:
                if keyword.arg not in (None, "strict"):
                    kept = [other for other in given if other is not keyword]
                    yield node, ast.unparse(_with(node, keywords=kept))
        case ast.Slice():
            for name in ("lower", "upper"):
                bound = getattr(node, name)
                if bound is not None and not isinstance(bound, ast.Constant):
                    yield bound, f"{ast.unparse(bound)} + 1"


def _other_operators(node: ast.expr) -> Iterator[tuple[ast.expr, str]]:
    match node:
        case ast.Compare(ops=ops):
            for index, op in enumerate(ops):
                others = [*ops[:index], SWAPS[type(op)](), *ops[index + 1 :]]
                yield node, f"({ast.unparse(_with(node, ops=others))})"
        case ast.BinOp(op=op) if type(op) in SWAPS:
            yield node, f"({ast.unparse(_with(node, op=SWAPS[type(op)]()))})"
        case ast.BoolOp(op=op, values=values):
            yield node, f"({ast.unparse(_with(node, op=SWAPS[type(op)]()))})"
            for index in range(len(values)):
                kept = values[:index] + values[index + 1 :]
                yield node, f"({ast.unparse(_with(node, values=kept))})"
        case ast.UnaryOp(operand=operand):
            yield node, ast.unparse(operand)


def _with(node: ast.AST, **fields: object) -> ast.AST:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def draw(files: Sequence[str], number: int, seed: int) -> list[Mutant]:
    """``number`` mutants, or all: lines evenly over the files, and one fault of each line."""
    chance = random.Random(seed)
    lines: list[list[Mutant]] = []
    for file in files:
        by_line: dict[int, list[Mutant]] = {}
        for mutant in mutants_of(file):
            by_line.setdefault(mutant.line, []).append(mutant)
        lines += by_line.values()
    if not number:
        return [mutant for line in lines for mutant in line]
    step = max(1.0, len(lines) / number)
    offset = chance.random() * step
    places = [int(offset + step * n) for n in range(number) if offset + step * n < len(lines)]
    return [chance.choice(lines[place]) for place in places]


def functions_by_line(file: str) -> list[str]:
    """The qualified name of the function that each line of a file belongs to."""
    text = (SOURCE / file).read_text()
    names = [NOTHING] * len(text.splitlines())

    def visit(node: ast.AST, outer: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = outer
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{outer}.{child.name}".lstrip(".")
                if isinstance(child, ast.FunctionDef):
                    first = min(part.lineno for part in (child, *child.decorator_list))
                    length = child.end_lineno + 1 - first
                    names[first - 1 : child.end_lineno] = [name] * length
            visit(child, name)

    visit(ast.parse(text), "")
    return names


def files_of() -> list[str]:
    """The files under test, from src/syncbn on."""
    paths = sorted(path for room in ROOMS for path in (SOURCE / room).glob("*.py"))
    return [str(path.relative_to(SOURCE)) for path in paths]
