"""python -m opd_lightning.export run=FOLDER [to=FOLDER] [adapter=true] [push=ID]

A run's model as a folder: safetensors, the tokenizer with its chat template,
and a model card. from_pretrained, vLLM and others read it without this package.

  run=FOLDER      the run
  to=FOLDER       where to write; by default the run's model/, or adapter/
  adapter=true    the adapter alone, as PEFT saves it; by default it is merged
  base=ID         the base that the adapter names, a folder or hub id, if the
                  run's start model is not where the run found it
  push=ID         also upload the folder to a repository of the hub; the token
                  comes from HF_TOKEN or `hf auth login`
  private=false   make a new repository public; by default it is private
"""

import os
import sys
from pathlib import Path
from typing import Any

from opd_lightning.config.aliases import read_run
from opd_lightning.config.names import nearest
from opd_lightning.config.overrides import unwritable
from opd_lightning.runs.identity import is_run
from opd_lightning.utils.secrets import redact_secrets

OPTIONS = {"run", "to", "adapter", "base", "push", "private"}


def export(run: Path, to: Path, adapter: bool = False, base: str | None = None, place: str | None = None) -> Path:
    """Write the folder.

    Args:
        adapter: the adapter alone instead of the merged weights.
        base: of the adapter; None takes the run's start model.
        place: what the model card loads; None takes the folder's name.

    Raises:
        ValueError: `run` is no run folder with a checkpoint, `to` holds something else, or there is no such adapter or base.
    """
    if not is_run(str(run)):
        raise ValueError(f"run={run} is no run folder with config.yaml and checkpoints/last.ckpt.")
    if problem := unwritable(str(to)):
        raise ValueError(problem.replace("output_dir=", "to=", 1))
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"to={to} is not empty; choose another folder or remove it.")
    if base is not None and not adapter:
        raise ValueError(f"base={base} is for an adapter alone; add adapter=true, or leave it out.")
    from opd_lightning.models import Pretrained  # takes seconds
    from opd_lightning.reporting.card import card

    source = Pretrained(str(run), dtype=read_run(run)["model"]["dtype"])
    partial = to.with_name(f"{to.name}.partial")
    base = adapter_base(source, base) if adapter else None
    if base is not None:
        save_adapter(source, base, partial)
    else:
        lm, renderer = source.model(), source.renderer()
        lm.generation_config.eos_token_id = ends_of(renderer, source.generation_ends() or [])
        lm.save_pretrained(partial)
    source.tokenizer().save_pretrained(partial)
    (partial / "README.md").write_text(card(run, source.lineage(), place or to.name, base))
    readable(partial)
    if to.exists():
        to.rmdir()
    os.replace(partial, to)
    return to


def ends_of(renderer: Any, saved: list[int]) -> int | list[int]:
    """The ids at which programs that read the folder stop; those that the start model's folder names stay."""
    ends = renderer.end_ids if renderer.end_token is not None else sorted({*renderer.end_ids, *saved})
    return ends[0] if len(ends) == 1 else ends


def adapter_base(source: Any, base: str | None) -> str:
    """The folder or hub id of an adapter's base, which transformers can load.

    Raises:
        ValueError: the run has no adapter, or its start model is a run or an adapter and no base is given.
    """
    from opd_lightning.models.pretrained import locate

    if read_run(source.path).get("adapter") is None:
        raise ValueError(f"run={source.path} has trained all weights and has no adapter; leave out adapter=true.")
    start = source.start()
    if base is None and (is_run(start.path) or start.is_adapter()):
        raise ValueError(
            f"adapter=true: the run's start model, {start.path}, is no plain model. Export it (run={start.path} "
            "to=<folder>) and give that folder as base=<folder>, or leave out adapter=true for merged weights."
        )
    place = locate(base or start.path)
    return str(Path(place).absolute()) if Path(place).is_dir() else place


def save_adapter(source: Any, base: str, folder: Path) -> None:
    """Save the adapter of a run as PEFT does, with the name of its base.

    Raises:
        ValueError: the base has other weights than the model that the adapter was trained on.
    """
    import torch

    from opd_lightning.models import Pretrained, adapters
    from opd_lightning.models.pretrained import locate

    lm: Any = source.adapted()
    if base not in (locate(source.start().path), str(Path(locate(source.start().path)).absolute())):
        own = {k.replace(".base_layer.", "."): v for k, v in lm.state_dict().items() if ".lora_" not in k}
        given = Pretrained(base, str(source.dtype).removeprefix("torch."), field="base").model().state_dict()
        if set(own) != set(given) or not all(torch.equal(value, given[key]) for key, value in own.items()):
            raise ValueError(f"base={base} has other weights than the adapter was trained on; export the run's start model.")
    assert adapters.is_low_rank(lm)
    for config in lm.peft_config.values():
        config.base_model_name_or_path = base
    lm.save_pretrained(folder)


def readable(folder: Path) -> None:
    """Give every file the permissions of newly made ones; libraries write some through private temporary files."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def check_push(repository: str) -> None:
    """Check before the export that a repository can be pushed to.

    Raises:
        ValueError: the name is none, or there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"push={repository} is no repository's name ({error}).") from error
    if not get_token():
        raise ValueError(f"push={repository} needs a token of the hub; set HF_TOKEN, or run `hf auth login`.")


def push(folder: Path, repository: str, private: bool = True) -> str:
    """Upload a folder to the hub, into a new repository or an existing one; returns its address.

    Raises:
        ValueError: the hub refuses, or does not answer.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Upload by OPD-Lightning")
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"push={repository}: the hub did not take it ({reason}); the folder stays in {folder}.") from error
    return str(address)


def check_options(given: dict[str, str]) -> None:
    """Raises ValueError for an unknown option, one without a value, or a missing run."""
    if unknown := [key for key in given if key not in OPTIONS]:
        folder = Path(unknown[0]).is_dir() and not given[unknown[0]]
        hint = f"; write run={unknown[0]}" if folder else nearest(unknown[0], OPTIONS)
        raise ValueError(f"{unknown[0]} is no option of the export{hint}")
    if empty := [key for key, value in given.items() if not value]:
        raise ValueError(f"{empty[0]}= has no value; write {empty[0]}=...")
    if "run" not in given:
        raise ValueError("run= is missing; give the folder of a run (run=<folder>).")


def switch(given: dict[str, str], name: str, default: bool) -> bool:
    """The value of a true or false option."""
    value = given.get(name, str(default).lower())
    if value not in ("true", "false"):
        raise ValueError(f"{name}={value} should be true or false.")
    return value == "true"


def main() -> None:
    """The command of the export."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    given = {key: value for key, _, value in (word.partition("=") for word in sys.argv[1:])}  # paths, whatever is in them
    if not given:
        sys.exit(__doc__)
    try:
        check_options(given)
        adapter, private = switch(given, "adapter", False), switch(given, "private", True)
        run, repository = Path(given["run"]), given.get("push")
        if repository is not None:
            check_push(repository)
        print("loading torch and transformers ...", file=sys.stderr, flush=True)
        to = Path(given.get("to", run / ("adapter" if adapter else "model")))
        print(f"exported: {export(run, to, adapter, given.get('base'), repository)}")
        if repository is not None:
            print(f"pushed: {push(to, repository, private)}")
    except ValueError as error:
        sys.exit(f"error: {redact_secrets(str(error))}")


if __name__ == "__main__":
    main()
