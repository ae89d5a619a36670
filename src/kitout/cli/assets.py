"""`kitout assets list | get NAME... | path NAME`: the built-in models and data sets, fetched from the package index.

Only options and printing here; `kitout.assets.store` does the work. `get` shows the license and the caveat of each
asset, because both belong beside any number published with it.
"""

from __future__ import annotations

from typing import Annotated

import typer

from kitout.cli.terminal import report_errors

HELP = "List, fetch and locate the built-in models and data sets, for example: kitout assets get smollm2-135m tweets"

app = typer.Typer(name="assets", help=HELP, no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """List the built-in models and data sets: kind, download size, license, caveat."""
    from kitout.assets.catalog import ASSETS, GROUPS
    from kitout.assets.store import cache_dir, is_installed

    for name, asset in ASSETS.items():
        size = "ready" if is_installed(name) else f"{asset.wheel.megabytes:g} MB"
        typer.echo(f"{name:<14} {asset.kind:<10} {size:>8}  {asset.description}")
        typer.echo(f"{'':<35}{asset.license}{'; ' + asset.caveat if asset.caveat else ''}")
    typer.echo("groups: " + "; ".join(f"{g} = {' '.join(members)}" for g, members in GROUPS.items() if g != "all"))
    typer.echo(f"cache folder: {cache_dir()} (set KITOUT_CACHE to change it); `kitout assets get NAME...` downloads")


@app.command()
def get(
    names: Annotated[list[str], typer.Argument(help="assets or groups: demo, models, default, all")],
) -> None:
    """Download, verify and convert assets; those already installed are kept."""
    from kitout.assets import store
    from kitout.assets.catalog import ASSETS
    from kitout.errors import KitoutError

    failed = []
    with report_errors():
        asset_names = store.expand_names(names)
    for name in asset_names:
        asset = ASSETS[name]
        try:
            folder = store.fetch_asset(name, log=typer.echo)
        except KitoutError as error:  # the others may still work: print it, continue, fail at the end
            typer.echo(f"error: {error}", err=True)
            failed.append(name)
            continue
        typer.echo(f"{name}: {folder}\n  license: {asset.license}")
        if asset.caveat:
            typer.echo(f"  note: {asset.caveat}")
    if failed:
        typer.echo(f"error: not installed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


@app.command()
def path(name: Annotated[str, typer.Argument(help="asset name")]) -> None:
    """Print the folder of an installed asset, for scripts; it downloads nothing."""
    from kitout.assets import store

    with report_errors():
        typer.echo(store.asset_path(name))
