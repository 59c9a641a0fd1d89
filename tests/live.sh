# Sourced by the tests that need a live server: a virtual environment, a server, and what to do without.
# Expects $antefix, runs in the repository's root.
venv=target/clients
python=$venv/bin/python
server=
trap 'kill ${server:-} 2>/dev/null || true' EXIT

# Installs what REQUIREMENTS names.
packages() {
    [ -x "$python" ] || python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$1"
}

# Starts a server on SmolLM2 and sets $base; arguments go to `serve`.
serve() {
    local log
    log=$(mktemp)
    "$antefix" serve --model smollm2 --port 0 "$@" 2>"$log" &
    server=$!
    for _ in $(seq 300); do
        base=$(sed -n 's/^serving .* on \(http:[^ ]*\).*/\1/p' "$log")
        [ -n "$base" ] && return
        kill -0 "$server" 2>/dev/null || break
        sleep 0.1
    done
    cat "$log"
    exit 1
}

# Ends it: a server that drained ends with 0.
finish() {
    kill -TERM "$server"
    wait "$server"
    server=
}
