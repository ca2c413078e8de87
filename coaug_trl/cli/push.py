"""`coaug push`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.errors import InputError
from ..utils.terminal import show
from .options import add_output, note_all


if TYPE_CHECKING:
    from ..publishing.upload import Upload


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "push",
        help="publish a run, augmentations or an index on the Hugging Face Hub",
        description="Publishes FOLDER as what it holds: a trained policy (a model), augmentations (a dataset) or an "
        "index (a model, as bm25s has them), with a card, and without checkpoints, pickles and paths of this machine. "
        "The same command goes on after a failure, and updates what is there.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="output_dir of a training, or what augment or index made")
    parser.add_argument("--repo_id", metavar="USER/NAME", help="repository, made if it is not there")
    parser.add_argument("--private", action="store_true", help="nobody else may see the repository")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made if it is not there; default: main")
    parser.add_argument(
        "--evaluations", nargs="+", default=[], metavar="DIR", help="of a run: evaluations that are not beneath it"
    )
    parser.add_argument("--collection", help="of augmentations: their collection, whose texts are published with them")
    parser.add_argument("--split", default="test", help="its split; default: test")
    parser.add_argument("--space", metavar="DIR", help="of an index: write a Space that searches it, and push that")
    parser.add_argument("--model", help="of a Space: policy that augments the queries, a folder or a Hub id")
    parser.add_argument("--dry_run", action="store_true", help="list the files and print the card, without the Hub")
    add_output(parser)
    parser.set_defaults(run=run, resumes=True)


def run(options: argparse.Namespace) -> None:
    from ..publishing.upload import prepare

    if options.space:
        _push_space(options)
        return
    if options.model:
        raise InputError("--model is for a Space; give --space, or leave it out.")
    if options.repo_id is None:
        raise InputError("--repo_id is missing; give the repository to publish to, as USER/NAME.")
    upload = prepare(options.folder, options.repo_id, options.evaluations, options.collection, options.split)
    _push_upload(upload, options)


def _push_space(options: argparse.Namespace) -> None:
    """Writes a Space, of a dry run into a folder that goes away, and pushes it if it is to go anywhere."""
    from tempfile import TemporaryDirectory

    from ..publishing.space import write_space
    from ..publishing.upload import Upload, check_repo_id
    from ..serving.demo import JudgedQueries
    from ..serving.index import SearchIndex

    if options.repo_id:
        check_repo_id(options.repo_id)  # rather now than after the work
    judged = None
    if options.collection:
        judged = JudgedQueries.load(options.collection, options.split, SearchIndex.load(options.folder))
    with TemporaryDirectory() as temporary:
        folder = temporary if options.dry_run else options.space
        paths = write_space(folder, options.folder, options.model, judged)
        if options.repo_id or options.dry_run:
            files = {path.relative_to(folder).as_posix(): path for path in paths}
            _push_upload(Upload("space", files), options)
        else:
            show(
                {"folder": options.space, "files": len(paths)},
                f"{len(paths)} files in {options.space}; try them by python {Path(options.space) / 'app.py'}",
            )


def _push_upload(upload: "Upload", options: argparse.Namespace) -> None:
    """Uploads, or shows what would be uploaded."""
    from ..publishing.upload import push as push_to_hub

    note_all(upload.notes)
    sizes, page = upload.sizes, str(upload.card or "")
    total = f"{len(sizes)} files, {_bytes(sum(sizes.values()))}"
    content = {"repo_id": options.repo_id, "repo_type": upload.repo_type, "files": sizes}
    if options.dry_run:
        files = "\n".join(f"{_bytes(size):>10}  {name}" for name, size in sorted(sizes.items()))
        where = f", to the {upload.repo_type} {options.repo_id}" if options.repo_id else ""
        show(content | {"card": page}, f"{files}\n{total}{where}; nothing was uploaded\n\n{page}".rstrip())
        return
    commit = push_to_hub(upload, options.repo_id, options.private or None, options.revision)
    show(content | {"url": str(commit.repo_url), "commit": commit.oid}, f"{total}: {commit.repo_url}")


def _bytes(size: int) -> str:
    if size < 1000:
        return f"{size} B"
    return f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:,.1f} MB"
