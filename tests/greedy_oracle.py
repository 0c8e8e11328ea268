"""The plainest greedy decoding there is: the whole row is read again for every token. No cache, no batch."""

import torch


def greedy(model, prompt, n_tokens):
    """Return the greedy answer, past every end of turn."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n_tokens):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]
