"""Speed of mistral.rs on a GGUF file, in the JSON lines that `antefix bench --json` writes.

Runs inside the virtual environment that setup.sh makes: venv/bin/python mistralrs_row.py -m FILE.gguf -p 512 -n 128 -t 2

The times are mistral.rs's own (`Usage` of a completion request): one request that reads a prompt and writes one token, one
that reads a few words and writes `n`. Its prefix cache is off. Exit status 3: the loader cannot read this file.
"""

import argparse
import json
import os
import resource
import statistics
import sys

WORDS = "the river runs past old stone houses and people walk along it every day to see boats go by".split()


def numbers(text):
    return [int(n) for n in text.split(",") if int(n) > 0]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-p", "--prompt", type=numbers, default=[512], help="prompt lengths; 0 skips")
    parser.add_argument("-n", "--decode", type=numbers, default=[128], help="tokens to decode; 0 skips")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--repeats", type=int, default=1)
    return parser.parse_args()


def load(file):
    import mistralrs

    folder, name = os.path.split(os.path.abspath(file))
    which = mistralrs.Which.GGUF(quantized_model_id=folder, quantized_filename=name)
    runner = mistralrs.Runner(which=which, token_source="none", prefix_cache_n=0, max_seqs=1)

    def complete(words, n):
        text = " ".join(WORDS[i % len(WORDS)] for i in range(words))
        request = mistralrs.CompletionRequest(
            prompt=text, model="default", max_tokens=n, temperature=0.0, ignore_eos=True
        )
        return runner.send_completion_request(request).usage

    return complete


def main():
    args = arguments()
    # Read when the library starts its threads, so it is set before the import.
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        complete = load(args.model)
    except Exception as error:  # The binding raises ValueError or a panic's class, depending on what is missing.
        print(f"mistral.rs cannot load {args.model}: {error}", file=sys.stderr)
        return 3
    warm = complete(16, 4)
    tokens_per_word = warm.prompt_tokens / 16

    def report(test, runs):
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"test": test, "tok_s": statistics.median(runs), "runs": runs, "rss_mb": rss}), flush=True)

    for n in args.prompt:
        runs = []
        for _ in range(args.repeats):
            usage = complete(round(n / tokens_per_word), 1)
            runs.append(usage.prompt_tokens / usage.total_prompt_time_sec)
        report(f"pp{n}@d0", runs)
    for n in args.decode:
        runs = []
        for _ in range(args.repeats):
            usage = complete(16, n)
            # The first token comes out of the prompt's pass.
            runs.append((usage.completion_tokens - 1) / usage.total_completion_time_sec)
        report(f"tg{n}@d0", runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
