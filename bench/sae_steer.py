#!/usr/bin/env python3
"""Steering with features of a dictionary, beside a control.

    bench/sae_steer.py SERVER SAE FEATURES.html [--features 17,42] [--words 'a,b'] [--most 8] [--times 2] [--seeds 1] [--out FILE]

SERVER is the address of `antefix serve`, SAE the name of the dictionary under profiles/sae/, FEATURES.html its dashboard. For each feature: the
words that its page says it raises, and how often they are written per 100 tokens without a change, with the feature set to `--times` its largest
activation, and with another feature (drawn by seed) set to the same value. A feature does what it says if its words become more frequent, and do
not with the other one (drawn by seed from the five whose largest activation is the nearest). --words are counted instead. Without --features those with the clearest direct logits are taken: the page's order by the size of the tenth raised word.
"""
import argparse
import json
import random
import re
import urllib.request

PROMPTS = ["The", "In this", "This section describes", "If you want to", "A new", "For example,", "We have", "It is", "When the", "There are",
           "Note that", "You can", "Here is", "One of the", "To make", "After that,"]


def cards(path):
    text = open(path, encoding="utf-8").read()
    start = text.index('{"about"')
    return json.JSONDecoder().raw_decode(text[start:])[0]["cards"]


def words(card):
    found = []
    for token, _ in card["raises"]:
        word = token.strip().lower()
        if (len(word) >= 2 or not word.isalnum()) and word and word not in found:
            found.append(word)
    return found


def complete(server, prompt, seed, hooks):
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": 48, "temperature": 0.8, "seed": seed, "ignore_eos": True}
    if hooks:
        body["antefix"] = {"hooks": hooks}
    request = urllib.request.Request(f"{server}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["text"]


def frequency(texts, wanted):
    pattern = re.compile("|".join(re.escape(w) for w in wanted))
    hits = sum(len(pattern.findall(t.lower())) for t in texts)
    return 100 * hits / (48 * len(texts))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("server")
    parser.add_argument("sae")
    parser.add_argument("page")
    parser.add_argument("--features")
    parser.add_argument("--words")
    parser.add_argument("--most", type=int, default=8)
    parser.add_argument("--times", type=float, default=2)
    parser.add_argument("--seeds", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--out")
    args = parser.parse_args()
    all_cards = {c["feature"]: c for c in cards(args.page)}
    if args.features:
        chosen = [all_cards[int(f)] for f in args.features.split(",")]
    else:
        able = [c for c in all_cards.values() if len(words(c)) >= 6]
        chosen = sorted(able, key=lambda c: -c["raises"][-1][1])[: args.most]
    draw = random.Random(1)
    out = open(args.out, "a", encoding="utf-8") if args.out else None
    asked = [(p, i) for i, p in enumerate(PROMPTS * args.seeds)]
    plain = [complete(args.server, p, i, None) for p, i in asked]
    for card in chosen:
        value = args.times * card["max"]
        # One that is as loud, so that the stream is pushed as far; what it raises must not be counted for this one.
        wanted = args.words.split(",") if args.words else words(card)
        quiet = [c for c in all_cards.values() if not set(words(c)) & set(wanted)]
        loud = sorted(quiet, key=lambda c: abs(c["max"] - card["max"]))[:5]
        other = draw.choice(loud)["feature"]
        ways = {}
        for name, feature in [("steered", card["feature"]), ("control", other)]:
            hooks = f"attention_sae,sae={args.sae},read=none,edit={feature}:set:{value:.3f}"
            ways[name] = [complete(args.server, p, i, hooks) for p, i in asked]
        row = {"feature": card["feature"], "set": round(value, 3), "words": wanted, "control": other,
               "per_100_plain": frequency(plain, wanted), "per_100_steered": frequency(ways["steered"], wanted),
               "per_100_control": frequency(ways["control"], wanted), "plain": plain[0], "steered": ways["steered"][0], "controlled": ways["control"][0]}
        print(json.dumps(row), flush=True)
        if out:
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
