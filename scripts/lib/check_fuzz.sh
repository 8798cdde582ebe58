# Fuzzing for scripts/check: builds the targets of tests/fuzz, runs them, and shows that they find bugs.
# Not a program: scripts/check sources it, from the project's root, with machine.sh. What a target is lies in
# tests/fuzz/README.md.

fuzz_targets=(queue block net rng balloon pci serial wire api image snapshot used carried elf state restored moved owed)
cargo_fuzz_version=0.13.2

# Runs are judged by what they find, not by how much of a core they get.
fuzz_nice=(nice -n 19)

# The longest that one input may take, and the most memory that a target may come to hold. A honest input takes
# milliseconds and a target holds some 40 MB; single demands above 32 MiB end it at once (tests/fuzz/lib.rs).
fuzz_bounds=(-timeout=10 -rss_limit_mb=512 -max_len=8192)

# fuzz_tools: returns once there is a nightly compiler and cargo-fuzz.
fuzz_tools() {
  if ! cargo +nightly --version >/dev/null 2>&1; then
    echo "Fuzzing needs a nightly compiler. Run: rustup toolchain install nightly --profile minimal" >&2
    return 1
  fi
  if [[ $(cargo fuzz --version 2>/dev/null) != "cargo-fuzz $cargo_fuzz_version" ]]; then
    cargo install --quiet --locked cargo-fuzz --version "$cargo_fuzz_version"
  fi
}

# fuzz_build DIR [TARGET]: builds one target, or all, of the fuzz crate in DIR into the target directory of
# tests/fuzz. Without AddressSanitizer: unsafe code is confined to three rooms, and the static linking that
# .cargo/config.toml asks for, which AddressSanitizer cannot have, is off all the same, because cargo-fuzz sets its
# own flags.
fuzz_build() {
  local directory=$1
  shift
  (cd "$directory" && "${fuzz_nice[@]}" cargo +nightly fuzz build --fuzz-dir . --sanitizer none \
    --target-dir "$fuzz_root/tests/fuzz/target" "$@")
}

# fuzz_program NAME: path of a built target.
fuzz_program() {
  echo "$fuzz_root/tests/fuzz/target/x86_64-unknown-linux-gnu/release/$1"
}

# fuzz_run NAME TARGET SECONDS CORPUS LOG: runs program NAME on the seeds of TARGET and from there on. What it finds
# stays in target/fuzz/artifacts.
fuzz_run() {
  local name=$1 target=$2 seconds=$3 corpus=$4 log=$5
  local artifacts=$fuzz_root/target/fuzz/artifacts/$name
  mkdir -p "$corpus" "$artifacts"
  rm -f "$artifacts"/*
  # It stops itself; the outer bound is for a target that hangs so hard that it cannot.
  timeout --kill-after=10 $((seconds + 120)) "${fuzz_nice[@]}" "$(fuzz_program "$name")" \
    "$corpus" "$fuzz_root/tests/fuzz/seeds/$target" -max_total_time="$seconds" -print_final_stats=1 \
    -artifact_prefix="$artifacts/" "${fuzz_bounds[@]}" >"$log" 2>&1
}

# fuzz_said LOG: the first sentence of what ended a run.
fuzz_said() {
  grep -m 1 -A 1 'panicked at' "$1" | tail -n 1 | cut -c -90
  grep -m 1 -oE 'ERROR: libFuzzer: (timeout|out-of-memory|deadly signal).*' "$1" | grep -v 'deadly signal' || true
}

# fuzz_all SECONDS: every target for so long each, over its seeds and what earlier runs found worth keeping.
fuzz_all() {
  local seconds=$1 target log status failed=0
  fuzz_tools || return 1
  fuzz_build tests/fuzz || return 1
  mkdir -p target/fuzz
  printf '%-8s %12s %8s %8s  %s\n' target runs per-s edges outcome
  for target in "${fuzz_targets[@]}"; do
    log=target/fuzz/$target.log status=0
    fuzz_run "$target" "$target" "$seconds" "tests/fuzz/corpus/$target" "$log" || status=$?
    printf '%-8s %12s %8s %8s  ' "$target" \
      "$(awk '/^stat::number_of_executed_units/ {print $2}' "$log")" \
      "$(awk '/^stat::average_exec_per_sec/ {print $2}' "$log")" \
      "$(grep -oE 'cov: [0-9]+' "$log" | tail -n 1 | cut -d' ' -f2)"
    if ((status == 0)); then
      echo "holds"
    else
      echo "FAILS ($status): $(fuzz_said "$log"); input in target/fuzz/artifacts/$target, log in $log"
      failed=1
    fi
  done
  return "$failed"
}

# fuzz_plants SECONDS [TARGET...]: puts the bugs of tests/fuzz/plants, which are TARGET.patch and those that are TARGET-READER.patch,
# into a copy of the sources, one after the other, and fails when the target does not find one within SECONDS from the seeds alone, or
# finds what is no bug of the patch.
fuzz_plants() {
  local seconds=$1 target patch failed=0
  fuzz_tree=$fuzz_root/target/fuzz/planted
  shift
  (($#)) || set -- "${fuzz_targets[@]}"
  fuzz_tools || return 1
  need_packages patch || return 1
  fuzz_build tests/fuzz || return 1
  rm -rf "$fuzz_tree"
  mkdir -p "$fuzz_tree"
  # With new times, so that nothing built from an earlier copy passes for this one.
  git ls-files -z --cached --others --exclude-standard -- ':!tests/fuzz/seeds' |
    tar --create --null --files-from=- --ignore-failed-read 2>/dev/null |
    tar --extract --touch --directory "$fuzz_tree" || return 1
  # Programs of their own name: the target directory is shared, so that the libraries are built once.
  sed -i '/^\[\[bin\]\]/ {n; s/^name = "/name = "planted-/}' "$fuzz_tree/tests/fuzz/Cargo.toml"
  printf '%-12s %8s %12s  %s\n' plant seconds runs outcome
  for target; do
    for patch in "tests/fuzz/plants/$target.patch" "tests/fuzz/plants/$target"-*.patch; do
      [[ -e $patch ]] || continue
      fuzz_plant "$seconds" "$target" "$patch" || failed=1
    done
  done
  return "$failed"
}

# fuzz_plant SECONDS TARGET PATCH: the same for one bug, in the copy that there is.
fuzz_plant() {
  local seconds=$1 target=$2 patch=$3 plant status=0 log begun failed=0
  plant=$(basename "$patch" .patch)
  log=target/fuzz/planted-$plant.log
  if ! patch --directory "$fuzz_tree" --strip 1 --fuzz 0 --silent <"$patch"; then
    echo "$plant: $patch does not fit the sources any more; plant the bug anew"
    return 1
  fi
  if ! fuzz_build "$fuzz_tree/tests/fuzz" "planted-$target" >"$log" 2>&1; then
    tail -n 30 "$log"
    echo "$plant: the planted bug does not compile; see $log"
    failed=1
  else
    rm -rf "target/fuzz/corpus-planted"
    begun=$SECONDS
    fuzz_run "planted-$target" "$target" "$seconds" target/fuzz/corpus-planted "$log" || status=$?
    printf '%-12s %8d %12s  ' "$plant" $((SECONDS - begun)) \
      "$(awk '/^stat::number_of_executed_units/ {print $2}' "$log")"
    if ((status == 0)); then
      echo "NOT FOUND within $seconds s: $(head -n 1 "$patch")"
      failed=1
    elif ! "$(fuzz_program "$target")" "${fuzz_bounds[@]}" target/fuzz/artifacts/"planted-$target"/* \
      >"target/fuzz/unplanted-$plant.log" 2>&1; then
      echo "FAILS WITHOUT THE BUG TOO: $(fuzz_said "target/fuzz/unplanted-$plant.log")"
      failed=1
    else
      echo "found: $(head -n 1 "$patch")"
    fi
  fi
  # The reversed patch has a new time, so the next build does not take the bug along.
  patch --directory "$fuzz_tree" --strip 1 --fuzz 0 --silent --reverse <"$patch" || return 1
  return "$failed"
}
