"""transformers' generate on one batch of equally long prompts: python transformers_child.py FOLDER DTYPE THREADS."""

from __future__ import annotations

import sys

from answering import answers, serve


def main() -> None:
    answer = answers()
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def run(prompts: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(prompts)
        # No end token: every stream goes on to the last one asked for.
        settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert out.shape[1] == ids.shape[1] + tokens, f"{out.shape[1]} tokens for {ids.shape[1]} + {tokens}"

    model.generation_config.eos_token_id = None
    serve(answer, run)


if __name__ == "__main__":
    main()
