"""Small tokenizers of every kind, built from nothing, and tiny models with them."""

from functools import cache
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.models import Pretrained, Student
from opd_lightning.types import Example, Sample

TEXTS = [
    "The quick brown fox jumps over the lazy dog. the the of and to in",
    "def f(x):\n\treturn x ** 2  # squares\n\nfor i in range(10):\n    print(f(i))",
    "rotate 1 2 3 = answer 4 5 red green blue copy sort 6 7 8 9 0",
    '{"name": "search", "arguments": {"query": "weather"}} <tool_call> </tool_call>',
    "naïve café Ångström 漢字 仮名 한국어 Привет мир",
]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
WORDS = ["the", "of", "and", "to", "in", "quick", "brown", "fox", "return", "range", "print", "answer"]
WORDS += ["red", "green", "blue", "copy", "sort", "rotate"]
LETTERS = sorted({c for text in TEXTS for c in text if c.isprintable()} - {" "})
CHAT = [{"role": "user", "content": "sort red blue"}]
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_bpe(size: int = 420) -> Tokenizer:
    """Byte-level BPE, as GPT-2's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    )
    return core


def unigram(prefix: bool = False, changed: bool = False) -> Tokenizer:
    """SentencePiece's unigram with byte fallback; with a blank before every text, or a normaliser that changes it."""
    pieces = [(name, 0.0) for name in SPECIAL] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [("▁", -3.0), ("\n", -4.0), *((letter, -6.0) for letter in LETTERS)]
    pieces += [(f"▁{word}", -4.0) for word in WORDS] + [(word, -5.0) for word in WORDS]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    steps = ([normalizers.NFKC(), normalizers.Lowercase()] if changed else []) + ([normalizers.Prepend("▁")] if prefix else [])
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return core


def wordpiece() -> Tokenizer:
    """BERT's: lower case, without accents, blanks dropped, unknown words."""
    vocabulary = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(dict.fromkeys(vocabulary))}, unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")
    return core


def characters() -> Tokenizer:
    """One token for each character that it knows."""
    vocabulary = [*SPECIAL, " ", "\n", *LETTERS]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, [], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    return core


@cache
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """The tokenizers by name."""
    cores = {
        "byte_bpe": byte_bpe(),
        "small_bpe": byte_bpe(300),
        "unigram": unigram(),
        "prefixed": unigram(prefix=True),
        "normalised": unigram(changed=True),
        "wordpiece": wordpiece(),
        "characters": characters(),
    }
    return {name: wrapped(core) for name, core in cores.items()}


def wrapped(core: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers with special tokens and a chat template."""
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> str:
    """A random model with a tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=2,
        eos_token_id=2,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def student_of(path: str) -> tuple[Student, ChatRenderer]:
    model = Pretrained(path)
    renderer = model.renderer()
    return Student(model.model(), valid_ids=renderer.valid_ids), renderer


def samples_of(renderer: ChatRenderer, texts: list[str], ended: bool = True) -> list[Sample]:
    """Replies with made-up log-probabilities of their sampling."""
    rows = []
    prompt = renderer.render(CHAT).token_ids
    for i, text in enumerate(texts):
        reply = renderer.reply(text)[: None if ended else -1]
        ids = torch.tensor([*prompt, *reply])
        logprobs = -torch.rand(len(ids), generator=torch.Generator().manual_seed(i)) * 3
        mask = torch.arange(len(ids)) >= len(prompt)
        rows.append(Sample(Example("e", CHAT), i, ids, mask, len(prompt), "student", "stop", logprobs))
    return rows
