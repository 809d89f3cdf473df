"""A byte-level BPE tokenizer trained on the generator's questions: any text works, the scenes' words are one token."""

import random
from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from training.data.questions import questions
from training.data.splits import scene_stream
from training.data.vocabulary import COLOURS, POSITIONS, SHAPES, WORDS

VOCAB_SIZE = 800
TRAINING_SCENES = 1000
WORD_REPEATS = 200
"""How often the corpus repeats each word of the vocabulary, so that its merges come before those of phrases."""

UNKNOWN, START, END, PAD, IMAGE = "<unk>", "<s>", "</s>", "<pad>", "<image>"

# LLaVA's conversation: the images of a message first, then its text.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] in ('user', 'assistant') %}{{ message['role'].upper() + ': ' }}{% endif -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor -%}
{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor -%}
{%- endif -%}
{{- '</s>' if message['role'] == 'assistant' else ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same every time. Like Llama's, it puts <s> before a text, and templates do not."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    # Single digits, so that 47 is read glyph by glyph as it is drawn.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (UNKNOWN, START, END, PAD, IMAGE)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A $B", special_tokens=[(START, tokenizer.token_to_id(START))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def closed_words() -> list[str]:
    """Every word that an answer can hold, and the words around it that every question uses."""
    corners = {word for position in POSITIONS for word in position.split()}
    return [*COLOURS, *SHAPES, *WORDS, *sorted(corners), "yes", "no", "card", "cards", "shape", "shapes"]


def _corpus() -> Iterator[str]:
    for word in closed_words():
        yield from [f"{word} {word}"] * WORD_REPEATS
    stream = scene_stream("train", seed=0)
    for index in range(TRAINING_SCENES):
        for asked in questions(next(stream), random.Random(index)):
            yield f"USER: \n{asked.question} ASSISTANT: {asked.answer}"
