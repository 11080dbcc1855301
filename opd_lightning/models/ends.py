"""The tokens with which a model really ends its replies, and a teacher that ends them with another one's."""

from torch import nn
from transformers import PreTrainedModel

from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.models.pretrained import Pretrained
from opd_lightning.runs.identity import is_run


def usual_ends(model: Pretrained, renderer: ChatRenderer) -> list[str]:
    """The tokens with which a model really ends its replies, as far as its files tell.

    A chosen `end_token` and a run end as they were trained. The end of a template is one where generation_config or the
    tokenizer's EOS names it too; a base model with its chat sibling's template ends with its own.
    """
    own = {*(model.generation_ends() or []), int(renderer.tokenizer.eos_token_id)}
    trained = renderer.end_token is not None or is_run(model.path) or renderer.end_id in own
    ids = [renderer.end_id] if trained else sorted(own)
    return [str(renderer.tokenizer.convert_ids_to_tokens(i)) for i in ids]


def exchange_rows(lm: PreTrainedModel, a: int, b: int) -> None:
    """Exchange two tokens' rows of a model's output layer, in a copy that is not tied; the model still reads both as before."""
    head = lm.get_output_embeddings()
    for name in ("weight", "bias"):
        rows = getattr(head, name, None)
        if rows is None:
            continue
        changed = rows.detach().clone()
        changed[[a, b]] = rows.detach()[[b, a]]
        setattr(head, name, nn.Parameter(changed, requires_grad=False))
    lm.config.get_text_config().tie_word_embeddings = lm.config.tie_word_embeddings = False
