"""`kitout assets list | get NAME... | path NAME`: the real models and data sets that come through the package index.

Only words and printing here; `kitout.assets.store` does the work. `get` shows the licence and the caveat of each asset
it makes, because both belong beside any number published with it.
"""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(name="assets", help="Real small models and data, fetched and converted once.", no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """Every asset: its kind, download size, licence, caveat and whether it is already here."""
    from kitout.assets.catalog import ASSETS, GROUPS
    from kitout.assets.store import cache_dir, is_installed

    for name, asset in ASSETS.items():
        state = "ready" if is_installed(name) else f"{asset.wheel.megabytes:g} MB"
        typer.echo(f"{name:<14} {asset.kind:<10} {state:>8}  {asset.description}")
        typer.echo(f"{'':<35}{asset.license}{'; ' + asset.caveat if asset.caveat else ''}")
    typer.echo("groups: " + "; ".join(f"{g} = {' '.join(members)}" for g, members in GROUPS.items() if g != "all"))
    typer.echo(f"kept in {cache_dir()} (KITOUT_CACHE moves it); `kitout assets get NAME...` fetches")


@app.command()
def get(names: Annotated[list[str], typer.Argument(help="asset or group names: demo, models, default, all")]) -> None:
    """Fetch, verify and convert assets that are not here yet."""
    from kitout.assets import store
    from kitout.assets.catalog import ASSETS
    from kitout.errors import KitoutError

    failed = []
    try:
        wanted = store.expand_names(names)
    except KitoutError as wrong:
        raise _exit_with_error(wrong) from wrong
    for name in wanted:
        asset = ASSETS[name]
        try:
            here = store.fetch_asset(name, log=typer.echo)
        except KitoutError as wrong:  # the others may still work: tell, go on, fail at the end
            typer.echo(f"error: {wrong}", err=True)
            failed.append(name)
            continue
        typer.echo(f"{name}: {here}\n  licence: {asset.license}")
        if asset.caveat:
            typer.echo(f"  note: {asset.caveat}")
    if failed:
        typer.echo(f"error: not made: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


@app.command()
def path(name: Annotated[str, typer.Argument(help="asset name")]) -> None:
    """Print the folder of an asset that is here, for scripts; never fetches."""
    from kitout.assets import store
    from kitout.errors import KitoutError

    try:
        typer.echo(store.asset_path(name))
    except KitoutError as wrong:
        raise _exit_with_error(wrong) from wrong


def _exit_with_error(error: Exception) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)
