"""Save a cache, send it, and continue elsewhere: prompts are computed on one machine and answered on another.

    python examples/save_and_send.py

The file crosses a socket to a second process here; a shared disk or an object store serves as well. It loads only
into the model that it was made with: a fingerprint of config and weights travels with it, and a checksum tells damage.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from kvcomp import CompressedCache, prefill
from kvcomp.integrations.huggingface.models import load_model

TEXT = "The bridge of Arlen was opened in 1712. The bridge of Corvan was opened in 1846. "
QUESTION = " The bridge of Arlen was opened in"


def receive(port: int, model_name: str) -> None:
    """The other machine: take a prompt and its cache from a socket, and print how it goes on."""
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rb") as stream:
        ids = torch.tensor([[int(number) for number in stream.readline().split()]])
        received = stream.read()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "received.kv"
        path.write_bytes(received)
        model, tokenizer = load_model(model_name)
        cache = CompressedCache.load(path, model)
    held = cache.get_seq_length()
    out = model.generate(ids.to(model.device), past_key_values=cache, max_new_tokens=8, do_sample=False)
    print(
        f"answered from {held} tokens that came as {len(received):,} bytes:{tokenizer.decode(out[0, ids.shape[1] :])}"
    )


def main(stack: str = "kivi(bits=4)", tokens: int = 512, model_name: str = "smollm2-135m") -> dict[str, object]:
    model, tokenizer = load_model(model_name)
    document = tokenizer(TEXT * 40, return_tensors="pt").input_ids[:, :tokens].to(model.device)
    prompt = torch.cat([document, tokenizer(QUESTION, return_tensors="pt").input_ids.to(model.device)], 1)
    cache = CompressedCache(stack, model)
    prefill(model, document, [cache], tokenizer=tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "document.kv"
        cache.save(path)
        saved = path.read_bytes()
    dense = cache.memory().dense
    print(f"{tokens} tokens: {len(saved) / 2**20:.2f} MiB on the wire, {dense / 2**20:.2f} MiB from a DynamicCache")

    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, __file__, str(server.getsockname()[1]), model_name]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        server.settimeout(300)
        with server.accept()[0] as connection:
            connection.sendall(" ".join(map(str, prompt[0].tolist())).encode() + b"\n" + saved)
        said = other.communicate(timeout=300)[0].strip()
    here = model.generate(prompt, past_key_values=cache, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(here[0, prompt.shape[1] :])
    print(f"{said}\nthe same here:{text}")
    return {"sent": len(saved), "dense": dense, "there": said, "here": text}


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else receive(int(sys.argv[1]), sys.argv[2])
