"""`dist-reg methods [NAME]`: what there is, and what a method's options mean."""

from __future__ import annotations

import ast
import dataclasses
import inspect

import click
from rich.console import Console
from rich.table import Table

from dist_reg.errors import UserError, nearest
from dist_reg.methods import METHODS, Method


@click.command("methods")
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List the methods, or the options of method NAME."""
    console = Console()
    if name is None:
        table = Table("method", "what it does", "source", box=None, pad_edge=False)
        for method in METHODS.values():
            table.add_row(method.name, method.summary, method.source)
        console.print(table)
        console.print("\ndist-reg methods NAME shows a method's options.", highlight=False)
        return
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; {nearest(name, list(METHODS))}")
    method = METHODS[name]
    console.print(f"{method.name}: {method.summary}\n{method.source}\n", highlight=False, markup=False)
    table = Table("option", "default", "meaning", box=None, pad_edge=False)
    meanings = field_docs(method)
    for option in dataclasses.fields(method):
        table.add_row(option.name, str(option.default), meanings.get(option.name, ""))
    console.print(table, markup=False)


def field_docs(method: type[Method]) -> dict[str, str]:
    """The docstring under each field of a dataclass, by field name."""
    body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(method))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, below in zip(body.body, body.body[1:]):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs
