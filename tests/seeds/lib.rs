//! The seeds of `tests/fuzz` without a fuzzer: as they are, and a few thousand inputs near them, the same ones each time. No
//! search for new paths, which `scripts/check` does. The tests of every room that has a fuzz target call it.
#![forbid(unsafe_code)]
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

pub mod change;

use change::{Random, change};

/// Inputs for a target: a fraction of a second for most in a debug build, where none of them makes much.
pub const INPUTS: u64 = 3000;

/// Longest input but for seeds that are longer, as for the fuzzers (`scripts/lib/check_fuzz.sh`).
const INPUT_BYTES_MAX: usize = 8192;

/// The longest that one input may take. An honest one takes milliseconds, but a busy host may stand still for a while.
const INPUT_TIME_MAX: Duration = Duration::from_secs(30);

/// Longest input that is shown whole where it fails.
const SHOWN_BYTES_MAX: usize = 64;

/// Hands over every seed of `target`.
pub fn replay(target: &str, mut body: impl FnMut(&[u8])) {
    for (name, seed) in kept(target) {
        println!("tests/fuzz/seeds/{target}/{name}");
        body(&seed);
    }
}

/// Hands over `count` inputs, each a seed of `target` that was changed in a few places. `FUZZ_SEED` chooses other ones and
/// `FUZZ_INPUTS` another number of them; input n is the same however many there are.
pub fn vary(target: &str, count: u64, mut body: impl FnMut(&[u8])) {
    let seeds = kept(target);
    let (seed, count) = (number("FUZZ_SEED").unwrap_or(1), number("FUZZ_INPUTS").unwrap_or(count));
    let place = root().join("target/fuzz/varied");
    fs::create_dir_all(&place).expect("the target directory can be written");
    let file = place.join(format!("{target}-{}", std::process::id()));
    for index in 0..count {
        let mut random = Random::new(seed, index);
        let (_, first) = random.one_of(&seeds);
        let (_, second) = random.one_of(&seeds);
        let mut input = first.clone();
        change(&mut input, second, &mut random);
        input.truncate(INPUT_BYTES_MAX.max(first.len()));
        // Before it is tried, for one that ends the whole process or never returns.
        fs::write(&file, &input).expect("the target directory can be written");
        let trial = Trial { target, seed, index, input: &input, file: &file };
        let begun = Instant::now();
        body(trial.input);
        assert!(begun.elapsed() < INPUT_TIME_MAX, "it took {:?}", begun.elapsed());
    }
    // One that failed is kept.
    let _ = fs::remove_file(file);
}

/// Every seed of `target`, by name, so that inputs are the same wherever they are made.
pub fn kept(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = root().join("tests/fuzz/seeds").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|cause| panic!("{}: {cause}", folder.display()));
    let read = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.expect("it can be listed").path();
        let name = path.file_name().expect("an entry has a name").to_string_lossy().into_owned();
        (name, fs::read(&path).expect("a seed can be read"))
    };
    let mut seeds: Vec<_> = entries.map(read).collect();
    seeds.sort();
    assert!(!seeds.is_empty(), "{} is empty", folder.display());
    seeds
}

/// Of the project.
fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).expect("it is two folders down")
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is a number, not {text:?}")))
}

/// An input that is being tried. Says how to try it again when it fails.
struct Trial<'a> {
    target: &'a str,
    seed: u64,
    index: u64,
    input: &'a [u8],
    file: &'a Path,
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let Trial { target, seed, index, input, file } = self;
        let shown: String = input.iter().take(SHOWN_BYTES_MAX).map(|byte| format!("{byte:02x}")).collect();
        let more = if input.len() > SHOWN_BYTES_MAX { "..." } else { "" };
        println!(
            "target {target}, FUZZ_SEED={seed}: input {index} fails, of {} bytes: {shown}{more}",
            input.len()
        );
        println!("It is in {}; as a file of tests/fuzz/seeds/{target} it is tried first.", file.display());
    }
}

#[cfg(test)]
mod tests;
