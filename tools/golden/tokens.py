#!/usr/bin/env python3
"""Writes tests/golden/tokens: awkward strings, and their token ids as Hugging Face `tokenizers` gives them.

    python3 -m venv /tmp/venv-tok && /tmp/venv-tok/bin/pip install tokenizers==0.23.3 gguf==0.19.0
    /tmp/venv-tok/bin/python tools/golden/tokens.py --models /tmp/models --gemma gemma3/tokenizer.json

Files, one JSON value a line, line N of each belongs together:
    strings.jsonl                   the texts
    <alias>.jsonl                   their ids, special tokens parsed, no begin token added
    counts.json                     versions, and how many lines each file has

SmolLM2 and Qwen2.5-Coder: the reference is built here from the tables of the GGUF file and the published normalizer and
pre-tokenizer. Gemma 3: the published tokenizer.json, because the GGUF file lost the scores of the runs of spaces, tabs and
newlines, without which the order of Hugging Face's merges cannot be had. Its vocabulary is compared with the file's first.
"""

import argparse, hashlib, json, pathlib, random, sys, unicodedata

import gguf
import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

SEED = 20251
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5

WORDS = """the of Hello world don't I'll we've they're it's he'd I'm DON'T I'LL naïve café résumé Straße ǅ İstanbul ıI
supercalifragilistic antidisestablishmentarianism GmbH&Co. e.g. U.S.A. x86_64 snake_case camelCase PascalCase kebab-case
日本語 中文字符 한국어 東京都 ไทย עברית العربية हिन्दी தமிழ் ελληνικά русский Українська ქართული አማርኛ বাংলা မြန်မာ ភាសាខ្មែរ
ﬁle ﬆ Å Å Ω K ½ ² Ⅷ ① ٣٤ ४२ 五 𝟘𝟙 𝔘𝔫𝔦 𐐷 𠮷 ﷺ ﷽""".split()
EMOJI = """😀 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 ❤️ ☕︎ 🧑🏿‍🚀 1️⃣ #️⃣ 🫠 🪿 👁️‍🗨️ ✈ ️ ‍ 🏴󠁧󠁢󠁥󠁮󠁧󠁿""".split(" ")
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\u00a0", "\u3000", "\u2003", "\u200b", "\u2028", "\u2029", "\u0085",
          "\u000b", "\u000c", "\u1680", "\u202f", "\u205f", "\ufeff", "\u180e", "\u001c", "\u001f", "\u2581", "\u2581\u2581"]
SPECIALS = """<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars> <jupyter_start>
<empty_output> <|object_ref_start|> <|vision_pad|> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|>
<|file_sep|> <tool_call> </tool_call> <bos> <eos> <pad> <unk> <mask> <start_of_turn> <end_of_turn> <unused0> <unused99>
<start_of_image> [multimodal] <table> </table> <h1> <0x0A> <0xE2> [PAD151665] <s> </s> <|eot_id|> <|begin_of_text|>
<|im_start <|im_start| im_end|> <|IM_START|> <|im_start|>> <<|im_end|> <|im _start|> <|endoftext <tool_call </tool_call""".split()
CODE = [
    "fn main() {\n    let x: Vec<u8> = vec![0; 1 << 20];\n    println!(\"{x:?}\");\n}\n",
    "def f(a, *b, **c):\n\t\"\"\"Doc.\"\"\"\n\treturn {k: v for k, v in c.items() if v is not None}\n\n\nclass A(B): pass\n",
    "#include <stdio.h>\r\nint main(void)\r\n{\r\n\tfor (int i=0;i<10;++i) printf(\"%d\\n\", i);\r\n\treturn 0;\r\n}\r\n",
    "const f = async ({a, b = 1}) => { await fetch(`https://x.y/${a}?q=${b}`); };\n// done\n",
    "SELECT t.*, COUNT(*) AS n FROM t LEFT JOIN u ON t.id=u.id WHERE u.name LIKE '%o''brien%' GROUP BY 1;\n",
    "<!DOCTYPE html>\n<html lang=\"en\"><body><h1>Hi &amp; bye</h1><br/><table><tr><td>1</td></tr></table></body></html>\n",
    "{\"a\": [1, 2.5e-3, null, true], \"b\": {\"c\": \"\\u00e9\\n\"}}\n",
    "func (s *Server) Do(ctx context.Context) error {\n\tif err := s.x(); err != nil {\n\t\treturn fmt.Errorf(\"x: %w\", err)\n\t}\n\treturn nil\n}\n",
    "for f in *.txt; do grep -E '^[a-z]+$' \"$f\" | awk '{print $1}' >> \"${f%.txt}.out\" 2>&1 || exit 1; done\n",
    "main :: IO ()\nmain = mapM_ print $ zipWith (\\a b -> a ^ 2 + b) [1..] \"abc\"\n",
    "\\begin{align}\n  \\int_0^\\infty e^{-x^2}\\,dx &= \\frac{\\sqrt{\\pi}}{2} \\\\\n\\end{align}\n",
    "a:\n  - b: 1\n    c: >-\n      folded\n\n      text\n  - {d: [x, y]}\n",
    "@@ -1,4 +1,4 @@\n-    old = 1\n+\tnew = 2\n \n",
    "IDENTIFICATION DIVISION.\n       PROGRAM-ID. HELLO.\n           DISPLAY 'HI'.\n",
]
URLS = ["https://example.com/a/b?c=d&e=%20f#g", "mailto:a.b+c@d.co.uk", "http://[::1]:8080/~x/", "C:\\Users\\x\\y.txt",
        "/usr/lib/x86_64-linux-gnu/libc.so.6", "192.168.0.1:443", "2024-02-29T23:59:60.123+01:00", "$1,234,567.89", "-1e-10",
        "0xDEADBEEF", "1_000_000", "3.14159265358979323846", "v1.2.3-rc.4+build", "+49 (0)30 123456", "50%", "1/2", "½¾Ⅷ³"]


def scalar(rng, low, high):
    while True:
        c = rng.randint(low, high)
        if not 0xD800 <= c <= 0xDFFF:
            return chr(c)


def strings():
    """The texts, in a fixed order, without duplicates."""
    rng = random.Random(SEED)
    out = {}

    def add(text):
        out.setdefault(text, None)

    add("")
    for c in range(0x250):
        add(chr(c))
        if c % 3 == 0:
            add(f"a{chr(c)}{chr(c)} {chr(c)}b")
    for text in WORDS + EMOJI + SPACES + SPECIALS + CODE + URLS:
        for form in ("{}", " {}", "{} ", "  {}\n", "{0}{0}", "x{}x"):
            add(form.format(text))
    # Runs of white space of every length around the longest token, at the start, in the middle and at the end.
    for space in (" ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "\r", "\u2581"):
        for n in [*range(1, 18), 30, 31, 32, 33, 62, 63, 64, 65, 127, 200]:
            for form in ("{}", "{}x", "x{}", "x{}y", "1{}2"):
                add(form.format(space * n))
    for pad in ("a", "A", "é", "日", "🙂", "0", "=", "-", ".", "'", "\"", "(", "e\u0301", "ab", "\u200d", "\x00"):
        for n in (2, 3, 4, 7, 16, 33, 100, 400):
            add(pad * n)
    for quote in "'’`":
        for tail in "s S t T re RE rE ve VE m M ll LL lL d D ſ ſx sx x ßs n't 've' 's's ﬆ".split():
            for form in ("{}", "it{}", " {}", "it{} x", "1{}", "é{}", "\n{}"):
                add(form.format(quote + tail))
    # Words, spaces, emoji and the like in a row.
    pools = [WORDS] * 4 + [SPACES] * 3 + [EMOJI, URLS, list("0123456789"), list("!?.,;:-_/\\|@#$%^&*()[]{}<>=+~`'\"")]
    for _ in range(900):
        add("".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(2, 14))))
    for _ in range(350):
        add(" ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 12))))
    # Special tokens inside text.
    for _ in range(350):
        add("".join(rng.choice(rng.choice([SPECIALS, SPECIALS, WORDS, SPACES])) for _ in range(rng.randint(2, 9))))
    # Pieces of code.
    code = "".join(CODE)
    for _ in range(450):
        start = rng.randrange(len(code))
        add(code[start:start + rng.randint(1, 160)])
    # Digits, in several scripts.
    for _ in range(150):
        add("".join(rng.choice("0123456789٠٣۴४५๙௧½²Ⅷ①𝟘 .,-") for _ in range(rng.randint(1, 24))))
    # Random characters: of one block, of a small window, of everything.
    blocks = [(0x20, 0x7E), (0, 0x2FF), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0x109F), (0x1100, 0x11FF),
              (0x1E00, 0x20CF), (0x2000, 0x2BFF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFFFF),
              (0x10000, 0x1FFFF), (0x1F300, 0x1FAFF), (0x20000, 0x323AF), (0xE0000, 0xE01EF), (0, 0x10FFFF)]
    for low, high in blocks:
        for _ in range(50):
            add("".join(scalar(rng, low, high) for _ in range(rng.randint(1, 20))))
    for _ in range(250):
        letters = [scalar(rng, *rng.choice(blocks)) for _ in range(rng.randint(1, 12))]
        add("".join(c + rng.choice(["", "", " ", "\u0301", "\u0323\u0307", "\n"]) for c in letters))
    # What NFC composes, decomposes, reorders and leaves alone.
    for base in "aeouAEsçşḱ한각が":
        for mark in ("\u0301", "\u0308", "\u0323\u0301", "\u0301\u0323", "\u0327\u0301", "\u3099", "\u11a8"):
            for form in ("NFC", "NFD"):
                add(unicodedata.normalize(form, base + mark) + "x")
    for text in ("\u212b\u2126\u212a", "\u0958", "\ufb1d", "\u1100\u1161\u11a8", "\u0344", "\u2adc", "\U0001d15e", "\uf900"):
        add(text)
        add(f" {text} ")
    return list(out)


class File:
    """The tokenizer tables of a GGUF file."""

    def __init__(self, path):
        fields = gguf.GGUFReader(path).fields

        def strs(key):
            field = fields[key]
            return [bytes(field.parts[i]).decode() for i in field.data]

        self.tokens = strs("tokenizer.ggml.tokens")
        types = fields["tokenizer.ggml.token_type"]
        self.types = [int(types.parts[i][0]) for i in types.data]
        self.merges = strs("tokenizer.ggml.merges") if "tokenizer.ggml.merges" in fields else []


def byte_level(file, normalizer, pre):
    vocab = {t: i for i, (t, k) in enumerate(zip(file.tokens, file.types)) if k not in (CONTROL, USER_DEFINED, UNUSED)}
    out = Tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in file.merges]))
    if normalizer:
        out.normalizer = normalizer
    out.pre_tokenizer = pre
    # Added tokens have to keep the ids of the file: they are given in its order, behind or before the vocabulary.
    for i, (text, kind) in enumerate(zip(file.tokens, file.types)):
        if kind in (CONTROL, USER_DEFINED):
            vocab[text] = i
    out.model = models.BPE(vocab, [tuple(m.split(" ")) for m in file.merges])
    for text, kind in zip(file.tokens, file.types):
        if kind == CONTROL:
            out.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            out.add_tokens([AddedToken(text, special=False, normalized=False)])
    for i, (text, kind) in enumerate(zip(file.tokens, file.types)):
        if kind in (CONTROL, USER_DEFINED) and out.token_to_id(text) != i:
            sys.exit(f"{text} got id {out.token_to_id(text)}, the file says {i}")
    return out


def smollm2(file):
    pre = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    return byte_level(file, None, pre_tokenizers.Sequence(pre))


def qwen2(file):
    pre = [pre_tokenizers.Split(Regex(QWEN2), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return byte_level(file, normalizers.NFC(), pre_tokenizers.Sequence(pre))


def gemma3(file, path):
    out = Tokenizer.from_file(str(path))
    for i, (text, kind) in enumerate(zip(file.tokens, file.types)):
        # The conversion to GGUF writes user-defined runs of U+2581 with real spaces.
        want = text.replace(" ", "\u2581") if kind == USER_DEFINED else text
        if out.id_to_token(i) != want:
            sys.exit(f"token {i} is {want!r} in the file, {out.id_to_token(i)!r} in {path}")
    return out


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--models", type=pathlib.Path, required=True, help="folder with the three GGUF files")
    args.add_argument("--gemma", type=pathlib.Path, required=True, help="tokenizer.json of Gemma 3")
    args.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parents[2] / "tests/golden/tokens")
    args = args.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    texts = strings()
    if len(texts) < 5000:
        sys.exit(f"only {len(texts)} strings")

    def write(name, values):
        lines = [json.dumps(v, ensure_ascii=True, separators=(",", ":")) for v in values]
        (args.out / name).write_text("\n".join(lines) + "\n")

    write("strings.jsonl", texts)
    counts = {"seed": SEED, "tokenizers": tokenizers.__version__, "strings": len(texts),
              "gemma_tokenizer_json_sha256": hashlib.sha256(args.gemma.read_bytes()).hexdigest(), "ids": {}}
    for alias, name, build in (
        ("smollm2", "smollm2-135m-q4_1.gguf", smollm2),
        ("qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b-q4_k_m.gguf", qwen2),
        ("gemma3-270m", "gemma-3-270m-q4_k_m.gguf", lambda file: gemma3(file, args.gemma)),
    ):
        reference = build(File(args.models / name))
        ids = [reference.encode(text, add_special_tokens=False).ids for text in texts]
        write(f"{alias}.jsonl", ids)
        counts["ids"][alias] = sum(map(len, ids))
    (args.out / "counts.json").write_text(json.dumps(counts, indent=2) + "\n")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
