"""`mlxsteer sae`: the group of the commands on dictionaries of features."""

from __future__ import annotations

import click

from mlxsteer.cli import sae_find, sae_shelf, sae_train


@click.group(name="sae")
def command() -> None:
    """Train and exchange sparse autoencoders: features that a second model finds.

    \b
    Examples:
      mlxsteer sae train --model demo --layer 15 --dry-run
      mlxsteer sae show residual-15-batchtopk --model demo
    """


for _command in (
    sae_train.train_command,
    sae_shelf.list_command,
    sae_shelf.show_command,
    sae_shelf.export_command,
    sae_shelf.import_command,
    sae_find.index_command,
    sae_find.find_command,
    sae_find.label_command,
):
    command.add_command(_command)
