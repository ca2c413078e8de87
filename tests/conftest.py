"""What the tests share: a small collection of real sentences, and tiny models made here, since no hub is assumed."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# More threads slow models this small down, above all where other work runs on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import shutil
import signal
from pathlib import Path

import pytest


# A shell starts a job in the background without Ctrl-C, which its children inherit; some tests need it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TOPICS = {
    "statins": ("cholesterol", "statin tablets", "heart attack"),
    "gluten": ("coeliac disease", "wheat bread", "stomach pain"),
    "coffee": ("caffeine", "espresso drinks", "restless sleep"),
    "sunlight": ("vitamin D", "ultraviolet rays", "brittle bones"),
    "salt": ("sodium chloride", "salty snacks", "high blood pressure"),
    "sugar": ("glucose", "sweet lemonade", "tooth decay"),
    "pollen": ("hay fever", "birch trees", "sneezing fits"),
    "running": ("endurance exercise", "long jogs", "sore knees"),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_beir_collection(folder: Path) -> Path:
    """A BEIR folder of 40 documents and 24 queries with train, dev and test splits and graded judgments."""
    (folder / "qrels").mkdir(parents=True)
    documents, queries, qrels = [], [], {"train": [], "dev": [], "test": []}
    for topic, (substance, source, effect) in TOPICS.items():
        texts = [
            f"A review of {substance} and its sources, such as {source}, in adult diets.",
            f"Patients who reported {effect} were asked how often they had {source}.",
            f"{substance.capitalize()} was measured in two hundred volunteers over one year.",
            f"Children and {source}: what parents should know about {topic}.",
            f"No link between {topic} and {effect} was found in this small trial.",
        ]
        for number, text in enumerate(texts):
            documents.append({"_id": f"{topic}-{number}", "title": f"On {topic}", "text": text})
        for split, question in (
            ("train", f"does {source} cause {effect}?"),
            ("dev", f"is {substance} harmful"),
            ("test", f"{topic} and {effect}"),
        ):
            query_id = f"{split}-{topic}"
            queries.append({"_id": query_id, "text": question})
            qrels[split] += [(query_id, f"{topic}-{number}", 2 if number == 1 else 1) for number in (0, 1, 4)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for split, rows in qrels.items():
        lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in rows)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def make_tiny_model(folder: Path, texts: list[str], chat: bool = True, hidden_size: int = 32) -> Path:
    """A Qwen2 model with random weights and a byte-level tokenizer trained on `texts`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size=600, show_progress=False)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.add_tokens(["<answer>", "</answer>"])
    tokenizer.padding_side = "left"
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def restore_environment():
    """A command's --quiet is for the libraries of its process, which is that of all tests here."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def beir_folder(tmp_path_factory) -> Path:
    return write_beir_collection(tmp_path_factory.mktemp("collections") / "advice")


@pytest.fixture(scope="session")
def collection(beir_folder):
    from coaug_trl import Collection

    return Collection.load(beir_folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, collection) -> Path:
    """A chat model that often writes `<answer> … </answer>`."""
    from coaug_trl.data.document import document_text

    texts = [document_text(document) for document in collection.corpus.values()] + list(collection.queries.values())
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", texts * 3)
    return teach_answers(folder, texts)


@pytest.fixture
def coaug(capsys):
    """Runs the command in this process; returns its exit code and what it printed."""

    def run(*arguments):
        from coaug_trl.cli.main import main

        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:  # argparse
            code = exit_.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def refused(coaug):
    """Runs a command that must fail on its input; returns the one line that says why."""

    def run(*arguments):
        code, _, errors = coaug(*arguments)
        assert code == 2, errors
        assert "Traceback" not in errors
        lines = [line for line in errors.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        assert errors.endswith(lines[0] + "\n")
        return lines[0]

    return run


def teach_answers(folder: Path, texts: list[str], steps: int = 150, learning_rate: float = 5e-3) -> Path:
    """Teaches a tiny model to answer any prompt with some words of the collection between the tags."""
    import random

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from coaug_trl import PromptSet

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt_set = PromptSet("sparse", "query:", "document:")
    words = sorted({word for text in texts for word in text.split()})
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        examples = []
        for text in draw.sample(texts, 16):
            prompt = prompt_set.prompt(draw.choice(["query", "document"]), text, tokenizer)
            if tokenizer.chat_template:
                prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            answer = " ".join(draw.sample(words, 3))
            examples.append((prompt, f"<answer> {answer}</answer>{tokenizer.eos_token}"))
        batch = tokenizer([prompt + answer for prompt, answer in examples], return_tensors="pt", padding=True)
        labels = batch.input_ids.clone()
        for row, (_, answer) in enumerate(examples):
            labels[row, : -len(tokenizer(answer).input_ids)] = -100
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chromium():
    """
    A headless browser; Debian's package, since Playwright's own download is not to be assumed. While it is there an
    event loop runs in this thread, which other tests must not meet.
    """
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium; install Debian's package chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=path, args=[*quiet, "--disable-component-update"])
        yield browser
        browser.close()


def write_answers(model_folder: Path, answers: list[tuple[str, str, str]], output_dir: Path) -> Path:
    """
    Makes a model that writes given answers to (side, text, answer) by a wide margin, whatever the processor: the last
    layer alone is fitted, to the mean of a prompt's random embeddings and the last token's own, until each token leads
    all others by 2 logits, with a repetition penalty of 1.2 and without.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from coaug_trl import PromptSet

    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    rows, starts = [], []
    for side, text, answer in answers:
        messages = PromptSet("sparse", "query:", "document:").prompt(side, text, tokenizer)
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        rows.append(prompt + f"<answer> {answer}</answer>{tokenizer.eos_token}")
        starts.append(len(tokenizer(prompt).input_ids))
    sizes = {"hidden_size": 128, "intermediate_size": 128, "initializer_range": 0.1, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder, **sizes))
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)  # attention to all tokens alike
    features, seen, wanted = [], [], []
    for row, start in zip(rows, starts, strict=True):
        ids = tokenizer(row, return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state[0]
        for place in range(start, ids.shape[1]):
            features.append(hidden[place - 1])
            seen.append(torch.zeros(len(tokenizer), dtype=torch.bool).index_fill(0, ids[0, :place], True))
            wanted.append(ids[0, place])
    features, seen, wanted = map(torch.stack, (features, seen, wanted))
    torch.nn.init.zeros_(model.lm_head.weight)
    optimizer = torch.optim.Adam(model.lm_head.parameters(), lr=0.1)
    for _ in range(2000):
        logits = model.lm_head(features)
        penalized = torch.where(seen, torch.where(logits > 0, logits / 1.2, logits * 1.2), logits)
        both, targets = torch.cat([logits, penalized]), torch.cat([wanted, wanted])[:, None]
        others = both.scatter(1, targets, -torch.inf).amax(1)
        if (both.gather(1, targets)[:, 0] - others).min() > 2:
            break
        torch.nn.functional.cross_entropy(both, targets[:, 0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    else:
        raise AssertionError("the answers cannot be told apart")
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return output_dir
