"""Loss masks token by token, packing that does not leak, and padding."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from slimtune.calib.formats import normalise
from slimtune.errors import CalibrationError, RecipeError, ShapeError
from slimtune.train.data import (
    IGNORED,
    Collator,
    Example,
    Packed,
    marked,
    pack,
    padding_id,
    tokenize,
    tokenize_seq2seq,
)

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As Qwen3 does: a reply carries its thoughts only while it is the last one.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}(thinks){% endif %}"
    "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
BEGIN, END = "[B]", "[E]"


def letters(template=None, *, begins=False, merges=()):
    """A byte-level tokenizer with one token per byte, and one for each pair in `merges`; it adds [B] if it `begins`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges), BEGIN, END])}
    backend = Tokenizer(models.BPE(vocabulary, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if begins:
        special = [(BEGIN, vocabulary[BEGIN])]
        backend.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BEGIN, eos_token=END, chat_template=template)


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    return {"messages": [{"role": roles[i % len(roles)], "content": text} for i, text in enumerate(contents)]}


def one(row, tokenizer, max_length=1000, **options):
    examples, _ = tokenize(normalise([row]), tokenizer, max_length, **options)
    [example] = examples
    return example


def masks(row, tokenizer, max_length=1000, **options):
    return marked(one(row, tokenizer, max_length, **options), tokenizer)


# Masks


def test_replies_and_their_ends_are_learnt():
    assert masks(turns("hi", "yo", "more", "é no"), letters(CHAT)) == (
        "«[B]<user>hi[E]\n<assistant>»yo[E]\n«<user>more[E]\n<assistant>»é no[E]\n"
    )


def test_every_label_is_its_token_or_ignored():
    tokenizer = letters(CHAT)
    example = one(turns("hi", "yo"), tokenizer)
    text = "[B]<user>hi[E]\n<assistant>yo[E]\n"
    assert example.input_ids == tokenizer(text)["input_ids"]
    masked = len(tokenizer("[B]<user>hi[E]\n<assistant>")["input_ids"])
    assert example.labels == [IGNORED] * masked + example.input_ids[masked:]
    assert len(example.labels) - masked == 4  # y, o, [E], line end


def test_reply_that_the_template_trims():
    assert masks(turns(" hi ", "  yo \n"), letters(CHAT)) == "«[B]<user>hi[E]\n<assistant>»yo[E]\n"


def test_system_turn_is_not_learnt():
    assert masks(turns("be", "q", "a", first="system"), letters(CHAT)) == (
        "«[B]<system>be[E]\n<user>q[E]\n<assistant>»a[E]\n"
    )


def test_template_without_a_reply_prompt_starts_at_the_turn():
    template = CHAT.split("{% if add_generation_prompt")[0]
    assert masks(turns("q", "a"), letters(template)) == "«[B]<user>q[E]\n»<assistant>a[E]\n"


def test_text_is_tokenised_as_a_whole():
    """A token over the seam of prompt and completion exists only in the whole text; it is learnt."""
    tokenizer = letters(merges=[("?", "a")])
    example = one({"prompt": "q?", "completion": "ab"}, tokenizer)
    assert example.input_ids == tokenizer("q?ab[E]")["input_ids"]
    assert marked(example, tokenizer) == "«q»?ab[E]"


def test_plain_formats_end_with_the_end_of_sequence():
    assert masks({"prompt": "q", "completion": "a"}, letters()) == "«q»a[E]"
    assert masks({"instruction": "q", "output": "a"}, letters()).endswith("### Instruction:\nq\n\n### Response:»a[E]")
    assert masks(turns("q", "a", "r", "b"), letters()) == (
        "«### User:\nq\n\n### Assistant:\n»a[E]«### User:\nr\n\n### Assistant:\n»b[E]"
    )


def test_tokenizer_that_begins_a_text_begins_a_plain_one_once():
    assert masks({"prompt": "q", "completion": "a"}, letters(begins=True)) == "«[B]q»a[E]"
    assert masks(turns("q", "a"), letters(CHAT, begins=True)) == "«[B]<user>q[E]\n<assistant>»a[E]\n"
    assert masks({"text": "ab"}, letters(CHAT, begins=True)) == "«[B]»ab[E]"


def test_text_is_all_learnt_but_its_first_token():
    assert masks({"text": "abc"}, letters(CHAT)) == "«a»bc[E]"


def test_no_mask_when_all_is_to_be_learnt():
    assert masks(turns("q", "a"), letters(CHAT), completion_only_loss=False) == "«[B]»<user>q[E]\n<assistant>a[E]\n"
    assert masks({"prompt": "q", "completion": "a"}, letters(begins=True), completion_only_loss=False) == "«[B]»qa[E]"


def test_template_that_rewrites_earlier_turns():
    tokenizer = letters(FORGETFUL)
    assert masks(turns("q", "a"), tokenizer) == "«<user>q[E]<assistant>»(thinks)a[E]"
    rows = normalise([turns("q", "a"), turns("q", "a", "r", "b")])
    with pytest.raises(RecipeError, match=r"prefix-stable[\s\S]*a\.jsonl, row 2, message 2[\s\S]*completion_only_loss"):
        tokenize(rows, tokenizer, 100, where="a.jsonl")
    examples, _ = tokenize(rows, tokenizer, 100, completion_only_loss=False)
    assert len(examples) == 2


def test_slow_tokenizer_is_refused(monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(RecipeError, match="fast tokenizer"):
        one(turns("q", "a"), letters(CHAT))


# Length and facts


def test_long_examples_are_cut_and_empty_ones_dropped():
    rows = [{"prompt": "q", "completion": "abcdef"}, {"prompt": "q" * 9, "completion": "a"}]
    examples, facts = tokenize(normalise(rows), letters(), max_length=4)
    assert examples == [one({"prompt": "q", "completion": "abcdef"}, letters(), max_length=4)]
    assert marked(examples[0], letters()) == "«q»abc"
    assert facts == {
        "rows": 2,
        "examples": 1,
        "dropped": 1,
        "truncated": 2,
        "tokens": 4,
        "trainable_tokens": 3,
        "sample": "«q»abc",
    }


def test_conversation_without_a_reply_is_dropped():
    _, facts = tokenize(normalise([turns("q"), turns("q", "a")]), letters(CHAT), 100)
    assert (facts["rows"], facts["examples"], facts["dropped"], facts["truncated"]) == (2, 1, 1, 0)


def test_long_text_becomes_several_examples():
    examples, facts = tokenize(normalise([{"text": "abcdefgh"}]), letters(), max_length=4)
    assert [marked(example, letters()) for example in examples] == ["«a»bcd", "«e»fgh"]
    assert (facts["examples"], facts["truncated"], facts["dropped"]) == (2, 0, 0)  # [E] alone teaches nothing


def test_nothing_left_is_an_error():
    with pytest.raises(CalibrationError, match=r"a\.jsonl[\s\S]*2 rows, 2 of them cut[\s\S]*max_length"):
        tokenize(normalise([{"prompt": "q" * 9, "completion": "a"}] * 2), letters(), 4, where="a.jsonl")


def test_many_rows_keep_their_order_and_numbers():
    rows = [{"prompt": "q", "completion": str(i)} for i in range(1003)]
    examples, _ = tokenize(normalise(rows), letters(), 100)
    assert [letters().decode(examples[i].input_ids) for i in (0, 999, 1000, 1002)] == [
        f"q{i}[E]" for i in (0, 999, 1000, 1002)
    ]
    refuse = "{% if messages[0].content == '1001' %}{{ raise_exception('no') }}{% endif %}" + CHAT
    with pytest.raises(CalibrationError, match="row 1002"):
        tokenize(normalise([turns(str(i), "a") for i in range(1003)]), letters(refuse), 100)


# Encoder-decoder


def test_seq2seq_parts():
    tokenizer = letters()
    rows = normalise([{"prompt": "ask", "completion": "abcd"}])
    [example], facts = tokenize_seq2seq(rows, tokenizer, 10)
    assert tokenizer.decode(example.input_ids) == "ask[E]"
    assert tokenizer.decode(example.labels) == "abcd[E]"
    assert (facts["tokens"], facts["trainable_tokens"], facts["sample"]) == (4, 5, "«ask[E]»abcd[E]")
    [cut], facts = tokenize_seq2seq(rows, tokenizer, 3)
    assert tokenizer.decode(cut.input_ids) == "as[E]"
    assert tokenizer.decode(cut.labels) == "abc"
    assert facts["truncated"] == 1


def test_seq2seq_learns_the_last_reply():
    rows = normalise([turns("q", "a", "r", "b"), turns("q")])
    [plain], facts = tokenize_seq2seq(rows, letters(), 100)
    assert letters().decode(plain.input_ids) == "### User:\nq\n\n### Assistant:\na### User:\nr\n\n### Assistant:\n[E]"
    assert letters().decode(plain.labels) == "b[E]"
    assert facts["dropped"] == 1
    [chat], _ = tokenize_seq2seq(rows, letters(CHAT), 100)
    assert letters().decode(chat.input_ids) == "[B]<user>q[E]\n<assistant>a[E]\n<user>r[E]\n<assistant>[E]"


def test_seq2seq_needs_a_prompt():
    with pytest.raises(CalibrationError, match=r"a\.txt, row 1"):
        tokenize_seq2seq(normalise([{"text": "x"}]), letters(), 10, where="a.txt")


def test_seq2seq_batch_trains_t5():
    rows = normalise([{"prompt": "ask", "completion": "abcd"}, {"prompt": "q", "completion": "a"}])
    examples, _ = tokenize_seq2seq(rows, letters(), 10)
    batch = Collator(0)(examples)
    assert batch["labels"].tolist()[1][2:] == [IGNORED] * 3
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    alone = [model(**Collator(0)([example])).loss.item() * len(example.labels) for example in examples]
    assert model(**batch).loss.item() == pytest.approx(sum(alone) / 7, rel=1e-5)


# Packing


def made(lengths, seed=0):
    generator = random.Random(seed)
    rows = [[generator.randrange(1, 60) for _ in range(length)] for length in lengths]
    return [Example(row, [IGNORED, *row[1:]]) for row in rows]


def test_packed_rows_hold_every_example_once():
    generator = random.Random(1)
    examples = made([generator.randrange(1, 40) for _ in range(200)])
    packed = pack(examples, 64)
    found = []
    for row in packed:
        assert len(row.input_ids) == len(row.labels) == len(row.position_ids) <= 64
        starts = [i for i, position in enumerate(row.position_ids) if position == 0]
        for start, stop in zip(starts, [*starts[1:], len(row.input_ids)], strict=True):
            assert row.position_ids[start:stop] == list(range(stop - start))
            found.append(Example(row.input_ids[start:stop], row.labels[start:stop]))
    assert sorted(found, key=str) == sorted(examples, key=str)
    assert len(packed) <= -(-sum(len(example.input_ids) for example in examples) // 64) * 11 / 9
    assert packed == pack(examples, 64)


def test_packing_fills_tightly_and_keeps_the_order():
    lengths = [[len(part) for part in parts(row)] for row in pack(made([5, 7, 3, 1, 8, 8]), 8)]
    assert lengths == [[5, 3], [7, 1], [8], [8]]


def parts(row):
    starts = [i for i, position in enumerate(row.position_ids) if position == 0]
    return [row.input_ids[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]


def test_no_example_predicts_the_next_ones_first_token():
    [row] = pack([Example([1, 2], [1, 2]), Example([3, 4], [3, 4])], 4)
    assert row == Packed([1, 2, 3, 4], [IGNORED, 2, IGNORED, 4], [0, 1, 0, 1])


def test_example_longer_than_a_row():
    with pytest.raises(ShapeError, match=r"got: +9[\s\S]*at most 8"):
        pack(made([9]), 8)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_logits_and_loss_equal_the_separate_ones(attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
        initializer_range=0.5,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    examples = made([5, 7, 3, 4, 6])
    packed = pack(examples, 12)
    assert len(packed) < len(examples)
    batch = Collator(pad_token_id=0, multiple_of=8)(packed)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    with torch.no_grad():
        together = model(**batch)
        alone = {tuple(e.input_ids): model(input_ids=torch.tensor([e.input_ids])).logits[0] for e in examples}
        losses = [model(**Collator(0)([e])).loss.item() * (len(e.input_ids) - 1) for e in examples]
    for row, logits in zip(packed, together.logits, strict=True):
        start = 0
        for ids in parts(row):
            torch.testing.assert_close(logits[start : start + len(ids)], alone[tuple(ids)], atol=1e-5, rtol=1e-5)
            start += len(ids)
    learnt = sum(len(example.input_ids) - 1 for example in examples)
    assert together.loss.item() == pytest.approx(sum(losses) / learnt, rel=1e-5)


# Padding


def test_collator_pads_right_to_the_longest():
    batch = Collator(pad_token_id=9)([Example([1, 2, 3], [IGNORED, 2, 3]), Example([4], [IGNORED])])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 9, 9]],
        "labels": [[IGNORED, 2, 3], [IGNORED, IGNORED, IGNORED]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_collator_rounds_up():
    batch = Collator(0, multiple_of=8)(made([9, 3]))
    assert {value.shape for value in batch.values()} == {(2, 16)}
    assert Collator(0, multiple_of=8)(made([8]))["labels"].shape == (1, 8)


def test_collator_gives_padding_positions_of_its_own():
    batch = Collator(9)([Packed([1, 2, 3], [IGNORED, 2, IGNORED], [0, 1, 0]), Packed([4], [IGNORED], [0])])
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]


def test_padding_id():
    tokenizer = letters()
    assert padding_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.pad_token = "a"
    assert padding_id(tokenizer) == tokenizer.convert_tokens_to_ids("a")
    tokenizer.pad_token = tokenizer.eos_token = None
    assert padding_id(tokenizer) == 0
