# The menu of this repository.
_default:
    @just --list

# everything CI runs, cheapest first
ci:
    .ci/run

# format the code
fmt:
    cargo fmt --all

# lints, and the rules that no compiler checks
lint:
    cargo clippy --workspace --all-targets -- -D warnings
    cargo xtask tidy

# tests whose name contains FILTER
test FILTER="":
    cargo test --workspace --release -- {{FILTER}}

# the tests of the kernels under the address sanitizer (nightly)
asan:
    RUSTFLAGS=-Zsanitizer=address cargo +nightly test -p antefix-kernels --release --target "$(rustc -vV | sed -n 's/^host: //p')"

# fuzz TARGET for SECONDS (nightly, cargo-fuzz); fuzz/README.md has the list
fuzz TARGET SECONDS="300":
    cargo run --manifest-path fuzz/Cargo.toml --example seeds
    cargo +nightly fuzz run {{TARGET}} -- -max_total_time={{SECONDS}} -max_len=262144 -rss_limit_mb=1024

# a folder for a new paper: just new-paper flex_prefill
new-paper SLUG:
    cargo xtask new-paper {{SLUG}}

# the reference documentation
docs:
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --workspace

# licences, duplicates and sources of the dependencies
deny:
    cargo deny check licenses bans sources
