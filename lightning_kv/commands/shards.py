"""`lightning-kv shards`: prompts or videos as tars with an index, and whether a set is whole."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from lightning_kv.commands.options import Command
from lightning_kv.commands.terminal import tell


@dataclass(frozen=True)
class ShardsOptions:
    """Pack prompts or videos into tars with an index, or check such a set.

    Args:
        do: make or check.
        source: For make a .txt, .csv or .json list of prompts, or a folder of videos; for check the
            folder of a set.
        out: Folder to write to, with make (none).
        name: Of the set (that of the list or folder).
        captions: Prompts of videos, .csv or .json (a .txt or .json file beside each video).
        per_shard: Prompts, or videos, in a tar (512 and 256).
        force: Replace a set of the same name in the folder.
    """

    do: Literal["make", "check"]
    source: Path
    out: Path | None = None
    name: str | None = None
    captions: Path | None = None
    per_shard: int | None = None
    force: bool = False


def run(options: ShardsOptions) -> int | None:
    """Do it; exit code 1 where a set is not whole.

    Raises:
        ValueError: Options do not fit what is to be done.
    """
    if not options.source.exists():
        kind = "the folder of a set" if options.do == "check" else "a list or a folder of videos"
        raise ValueError(
            f"{options.source} is not there. It was given as what is to "
            f"{'be checked' if options.do == 'check' else 'become shards'}. Give {kind}."
        )
    if options.do == "check":
        return check(options)
    if options.out is None:
        raise ValueError(
            f"Nothing says where the shards of {options.source} go: --out is missing. Write "
            f"`lightning-kv shards make {options.source} --out FOLDER`."
        )
    return make(options)


def make(options: ShardsOptions) -> None:
    """Write the shards of a list of prompts, or of a folder of videos.

    Raises:
        ValueError: Something of it cannot be used; nothing is written then.
    """
    from lightning_kv.data.make_shards import (
        earlier_set,
        make_prompt_shards,
        make_video_shards,
        name_of,
    )

    source, most = options.source, options.per_shard
    name = name_of(source) if options.name is None else options.name
    replaced = earlier_set(options.out, source, name, options.force)
    if source.is_dir():
        given = {} if most is None else {"shard_videos": most}
        made = make_video_shards(
            source, options.out, name, captions=options.captions, replaced=replaced, **given
        )
    elif options.captions is not None:
        raise ValueError(
            f"--captions {options.captions} are of videos, and {source} is no folder. Give a "
            "folder of videos, or leave --captions out."
        )
    else:
        given = {} if most is None else {"per_shard": most}
        made = make_prompt_shards(source, options.out, name, replaced=replaced, **given)
    size = sum(shard.bytes for shard in made.shards)
    tars = f"{len(made.shards)} shard{'s' * (len(made.shards) != 1)}"
    tell([f"{made.samples} samples in {tars} of {size:,} bytes: {options.out}"])


def check(options: ShardsOptions) -> int:
    """Say everything that is wrong with a set; 1 where there is something.

    Raises:
        ValueError: There is no set, or options are given that are of make.
    """
    from lightning_kv.data.check_shards import check_shards
    from lightning_kv.data.shards import INDEX, load_index

    given = [
        f"--{each.name}"
        for each in fields(options)
        if each.name not in ("do", "source") and getattr(options, each.name) != each.default
    ]
    if given:
        raise ValueError(
            f"`lightning-kv shards check` reads a set and takes no option of make: "
            f"{', '.join(given)} was given. Write `lightning-kv shards check {options.source}`."
        )
    if options.source.is_dir() and not (options.source / INDEX).exists():
        load_index(options.source)  # which says that there is none
    findings = check_shards(options.source)
    tell(findings or [f"{options.source} is whole."])
    return int(bool(findings))


COMMAND = Command(
    "shards",
    ShardsOptions,
    run,
    """\
The same input makes the same bytes. A list of prompts is a .txt file (one a line), a .csv file or a
.json list (VBench's full_info.json too) with a field prompt, prompt_en, caption or text.

examples:
  lightning-kv shards make prompts.txt --out data/mine
  lightning-kv shards make videos/ --captions captions.csv --out data/videos
  lightning-kv shards check data/mine""",
    positional={"do": "make|check", "source": "SOURCE"},
    metavars={"out": "FOLDER", "name": "NAME", "captions": "FILE"},
)
