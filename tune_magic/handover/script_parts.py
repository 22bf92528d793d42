"""The pieces that `script` puts together."""

IMPORTS = {  # each line, with a word of the script that needs it
    "import json": "json.", "import math": "math.", "": "", "import datasets": "datasets.", "import numpy as np": "np.", "import torch": "torch.",
    "from peft import LoraConfig, get_peft_model": "LoraConfig(", "from torch.nn import functional": "functional.",
    "from transformers import AutoModelForCausalLM, AutoTokenizer": "AutoTokenizer.",
    "from transformers import BitsAndBytesConfig": "BitsAndBytesConfig(",
    "from transformers import EarlyStoppingCallback": "EarlyStoppingCallback(", "from trl import SFTConfig, SFTTrainer": "SFTTrainer(",
}  # fmt: skip


def imports(code: str) -> str:
    """Return the imports that a script needs."""
    return "\n".join(line for line, word in IMPORTS.items() if word in code)


SPLIT_BY_FILE = '''def split(examples):
    """Return training and held-out examples."""
    return [one for _, one in examples], [one for _, one in encode(read_held_out())]
'''
SPLIT_BY_DRAW = '''HELD_OUT = {count}  # rows that are scored and not trained on


def split(examples):
    """Return training and held-out examples, drawn by the seed alone."""
    order = np.random.default_rng([SEED, 7919]).permutation(len(examples))
    held_out = sorted(order[:HELD_OUT])
    return [examples[i][1] for i in sorted(order[HELD_OUT:])], [examples[i][1] for i in held_out]
'''
SPLIT_BY_NUMBER = '''HELD_OUT = {numbers}  # numbers of the rows that are scored and not trained on, from 1


def split(examples):
    """Return training and held-out examples."""
    numbers = set(HELD_OUT)
    train = [example for number, example in examples if number not in numbers]
    return train, [example for number, example in examples if number in numbers]
'''
ANSWER_AS_CHAT = '''def chat(row):
    """Return a row as a chat, and the place of its answer."""
    asked, answer, system = question_and_answer(row)
    before = [{"role": "system", "content": system}] if system else []
    found = [*before, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return found, [len(found) - 1]


'''
CHAT_PIECES = '''def pieces(row):
    """Return the texts of a row in order, each with whether it is trained: the answers, with their end marks."""
    messages, answers = chat(row)
    found, done = [], ""
    for place in answers:
        before = tokenizer.apply_chat_template(messages[:place], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: place + 1], tokenize=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise ValueError("this chat template rewrites what stands before an answer")
        answer = after[len(before) :].rstrip()
        found += [(before[len(done) :], False), (answer, True)]
        done = before + answer
    return found


OPENS = False  # the template brings the opening tokens'''
PLAIN_PIECES = '''def pieces(row):
    """Return prompt and answer; the answer is trained."""
    asked, answer, system = question_and_answer(row)
    return [(f"{system}\\n\\n{asked}" if system else asked, False), (answer, True)]


OPENS = True  # the prompt begins with the tokenizer's opening tokens, and the answer ends with its last'''
ENCODE = '''def tokens_of(text, opens):
    """Return the tokens of a text."""
    ids = tokenizer(text, add_special_tokens=opens)["input_ids"]
    return ids[:-1] if opens and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def encode(rows):
    """Return (number of the row, (tokens, whether each is trained)) of every row in which something is trained."""
    found = []
    for number, row in enumerate(rows, start=1):
        ids, trained = [], []
        for place, (text, is_trained) in enumerate(pieces(row)):
            some = tokens_of(text, OPENS and place == 0)
            ids, trained = ids + some, trained + [is_trained] * len(some)
        if OPENS and tokenizer.eos_token_id is not None:
            ids, trained = [*ids, tokenizer.eos_token_id], [*trained, True]
        trained[:1] = [False] * len(trained[:1])  # nothing comes before the first token
        if any(trained[:MAX_LENGTH]):
            found.append((number, (ids[:MAX_LENGTH], trained[:MAX_LENGTH])))
    return found
'''
ENCODE_WHOLE = '''def encode(rows):
    """Return (number of the row, (tokens, whether each is trained)); a long text is cut into pieces of nearly one length."""
    found = []
    for number, row in enumerate(rows, start=1):
        ids = tokenizer(pieces(row)[0][0])["input_ids"]
        ids = ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
        ids = [*ids, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else ids
        for piece in np.array_split(ids, -(-len(ids) // MAX_LENGTH)):
            if len(piece) > 1:
                found.append((number, (piece.tolist(), [False] + [True] * (len(piece) - 1))))
    return found
'''
MODEL = '''def load_model():
    """Return the model, made trainable."""
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.{dtype}{options})
'''
LORA = """    config = LoraConfig({options}, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
"""
MODEL_END = """    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # small steps would be lost in rounding
    return model.to(device)


AUTOCAST = {autocast}  # compute in bfloat16
"""
OPTIMIZER = '''def make_optimizer(model):
    """Return the optimizer; biases and norms are not decayed."""
    groups = {{}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (0.0 if parameter.ndim < 2 else WEIGHT_DECAY, {ratio} if ".lora_B." in name else 1.0)
            groups.setdefault(key, []).append(parameter)
    groups = [{{"params": some, "weight_decay": decay, "factor": factor}} for (decay, factor), some in groups.items()]
    return {made}
'''
COSINE = '''def cosine(progress):
    """Return half a cosine, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


'''
RATE = '''def learning_rate(step):
    """Return the learning rate of a step, counted from 1."""
    if step <= WARMUP_STEPS:
        return RATE * step / WARMUP_STEPS
{body}
'''
LOSS = '''def loss_sum(model, examples, smoothing=0.0):
    """Return the sum of the losses of the trained tokens of a few examples."""
    width = max(len(ids) for ids, _ in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (tokens, trained) in enumerate(examples):
        row = torch.tensor(tokens)
        ids[i, : len(tokens)], mask[i, : len(tokens)] = row, 1
        labels[i, : len(tokens)] = torch.where(torch.tensor(trained), row, -100)
    with torch.autocast(device.type, torch.bfloat16, enabled=AUTOCAST):
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    flat, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(device)
    return functional.cross_entropy(flat, targets, ignore_index=-100, reduction="sum", label_smoothing=smoothing)


def weight(examples):
    """Return the number of trained tokens."""
    return sum(sum(trained) for _, trained in examples)


def microbatches(examples):
    """Return the examples in parts that are computed at once."""
    return [examples[i : i + MICROBATCH] for i in range(0, len(examples), MICROBATCH)]


@torch.no_grad()
def held_out_loss(model, examples):
    """Return the mean loss of the held-out rows."""
    model.eval()
    total = sum(float(loss_sum(model, some)) for some in microbatches(examples))
    model.train()
    return total / weight(examples)
'''
TRAINING = '''def rows_of(step, count):
    """Return which of `count` rows a step trains on: each once an epoch, in an order that follows from seed and epoch."""
    steps = -(-count // BATCH_SIZE)
    epoch, place = divmod(step - 1, steps)
    order = np.random.default_rng([SEED, epoch]).permutation(count)
    return order[place * BATCH_SIZE : (place + 1) * BATCH_SIZE]


def train():
    """Train, score, and keep the best."""
    examples, held_out = split(encode(read_rows()))
    model = load_model().train()
    optimizer = make_optimizer(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    best, waited = math.inf, 0
    for step in range(1, TOTAL_STEPS + 1):
        some = [examples[i] for i in rows_of(step, len(examples))]
        loss = 0.0
        for few in microbatches(some):
            part = loss_sum(model, few, LABEL_SMOOTHING) / weight(some)
            part.backward()
            loss += float(part.detach())
        if MAX_GRAD_NORM:
            torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step) * group["factor"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"step {step} loss {loss:.6f}", flush=True)
        if held_out and (step % EVAL_STEPS == 0 or step == TOTAL_STEPS):
            score = held_out_loss(model, held_out)
            print(f"step {step} held-out loss {score:.6f}", flush=True)
            waited = 0 if score < best - THRESHOLD else waited + 1
            if score < best:
                best = score
                model.save_pretrained(OUTPUT)
            if PATIENCE is not None and waited >= PATIENCE:
                break
    if not held_out:
        model.save_pretrained(OUTPUT)
    tokenizer.save_pretrained(OUTPUT)


if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    train()
'''
