//! What things cost, measured: groups of benchmarks by name, one table, rows as JSON. Not a test: nothing here judges
//! a figure. Run by `scripts/bench`, which builds what is measured; README.md says how to read each figure.
use std::fs::File;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

#[allow(dead_code, reason = "shared with the tests of the VMM, which use all of it")]
#[path = "../support/vmm_driver.rs"]
mod vmm_driver;

mod api;
mod client;
mod clone;
mod create;
mod density;
mod disk;
mod gaps;
mod ground;
mod groups;
mod guest;
mod host;
mod linux;
mod memory;
mod migrate;
mod moves;
mod net;
mod process;
mod rows;
mod snapshot;
mod start;
mod toft;
mod upgrade;
mod witness;

use ground::{Effort, Ground};
use rows::Report;

/// One group: what it measures, and the function that does.
struct Group {
    name: &'static str,
    what: &'static str,
    run: fn(&Ground, &mut Report),
}

/// A group is added here and in README.md. Alone it takes less than five minutes, and says what it cannot do by panic.
const GROUPS: &[Group] = &[
    Group {
        name: "start",
        what: "from exec, and from the request to the launcher, to the guest's first output",
        run: start::run,
    },
    Group {
        name: "create",
        what: "from the request for a server to its guest's first output; deletion; servers a second",
        run: create::run,
    },
    Group {
        name: "clone",
        what: "from exec to the first progress of a machine that was saved; 100 clones of a snapshot",
        run: clone::run,
    },
    Group {
        name: "snapshot",
        what: "how long a guest makes no progress while its memory is saved",
        run: snapshot::run,
    },
    Group { name: "api", what: "reads and lists over TCP with a token; the daemon's memory", run: api::run },
    Group {
        name: "density",
        what: "idle servers until 1,000 or memory is short; a new daemon finds them",
        run: density::run,
    },
    Group {
        name: "memory",
        what: "what a VMM holds beside its guest's memory, and a server is charged",
        run: memory::run,
    },
    Group { name: "disk", what: "random reads, sequential writes with flushes, beside QEMU", run: disk::run },
    Group {
        name: "migrate",
        what: "moves of 2 GiB over TCP, beside a bare program; how long the guest stands still",
        run: migrate::run,
    },
    Group {
        name: "upgrade",
        what: "a new VMM takes a running machine over; how long the guest stands still",
        run: upgrade::run,
    },
    Group { name: "moves", what: "the same moves through two daemons, over TLS", run: moves::run },
    Group { name: "net", what: "full-size and small frames both ways, beside QEMU", run: net::run },
    Group {
        name: "linux",
        what: "a stock kernel: start to init, fio, iperf3, beside QEMU; where KVM runs Linux",
        run: linux::run,
    },
];

fn main() -> ExitCode {
    let wanted = match Wanted::parse(std::env::args().skip(1)) {
        Ok(Some(wanted)) => wanted,
        Ok(None) => {
            print!("{}", help());
            return ExitCode::SUCCESS;
        }
        Err(why) => {
            eprintln!("bench: {why}\n\n{}", help());
            return ExitCode::from(2);
        }
    };
    // Opened first, so that nobody finds out after half an hour that it cannot be written.
    let json = match wanted.json.as_deref().map(open_json).transpose() {
        Ok(json) => json,
        Err(why) => {
            eprintln!("bench: {why}");
            return ExitCode::from(2);
        }
    };
    let ground = Ground::new(wanted.effort);
    let walls = match toft::walls() {
        Ok(walls) => walls,
        Err(why) => {
            eprintln!("bench: {why}");
            return ExitCode::FAILURE;
        }
    };
    eprintln!("bench: measuring the programs in {}; {walls}", ground.binaries.display());
    let mut report = Report::default();
    for group in GROUPS.iter().filter(|group| wanted.includes(group.name)) {
        eprintln!("bench: {}", group.name);
        let begun = Instant::now();
        // What one group cannot measure must not cost the figures of the others; the panic has told why.
        if catch_unwind(AssertUnwindSafe(|| (group.run)(&ground, &mut report))).is_err() {
            report.failed(group.name);
        }
        eprintln!("bench: {} took {:.0} s", group.name, begun.elapsed().as_secs_f64());
    }
    print!("{}", report.table(&format!("{}\n{walls}", ground.words())));
    if let Some(mut file) = json
        && let Err(error) = file.set_len(0).and_then(|()| file.write_all(report.json().as_bytes()))
    {
        eprintln!("bench: the rows cannot be written: {error}");
        return ExitCode::FAILURE;
    }
    // Who asks for everything wants what there is; who names a group wants that one.
    let is_refused = report.has_skipped() && !wanted.groups.is_empty();
    if is_refused {
        eprintln!(
            "bench: a group that was asked for cannot be measured here; the table's last lines say why"
        );
    }
    if report.is_whole() && !is_refused { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What it holds is kept until there are new rows.
fn open_json(path: &Path) -> Result<File, String> {
    let opened = File::options().write(true).create(true).truncate(false).open(path);
    opened.map_err(|error| format!("--json: {} cannot be written: {error}", path.display()))
}

/// What the command line asks for.
struct Wanted {
    effort: Effort,
    json: Option<PathBuf>,
    /// Empty means all.
    groups: Vec<String>,
}

impl Wanted {
    /// None when only help is wanted.
    fn parse(arguments: impl Iterator<Item = String>) -> Result<Option<Wanted>, String> {
        let mut wanted = Wanted { effort: Effort::Full, json: None, groups: Vec::new() };
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--help" | "-h" => return Ok(None),
                // Given by `cargo bench`.
                "--bench" => (),
                "--smoke" => wanted.effort = Effort::Smoke,
                "--json" => wanted.json = Some(arguments.next().ok_or("--json wants a file")?.into()),
                name if GROUPS.iter().any(|group| group.name == name) => wanted.groups.push(argument),
                other => return Err(format!("there is no group or option {other}")),
            }
        }
        Ok(Some(wanted))
    }

    fn includes(&self, name: &str) -> bool {
        self.groups.is_empty() || self.groups.iter().any(|group| group == name)
    }
}

fn help() -> String {
    let groups: String = GROUPS.iter().map(|group| format!("  {:<9} {}\n", group.name, group.what)).collect();
    format!(
        "scripts/bench [--json FILE] [--smoke] [GROUP...]\n\n{groups}\n\
         --json FILE  also writes the rows {{bench, case, who, unit, median, p99, min, max, n}}\n\
         --smoke      few samples: shows that everything runs, measures nothing\n\n\
         tests/bench/README.md says how to read each figure and what it does not say.\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Option<Wanted>, String> {
        Wanted::parse(words.iter().map(|word| (*word).to_owned()))
    }

    #[test]
    fn a_command_line_that_asks_for_nothing_there_is_is_refused() {
        let refused = |words: &[&str]| parse(words).err().unwrap();
        assert_eq!(refused(&["disk", "nonsense"]), "there is no group or option nonsense");
        assert_eq!(refused(&["--long"]), "there is no group or option --long");
        assert_eq!(refused(&["--json"]), "--json wants a file");
        assert!(parse(&["--help", "nonsense"]).unwrap().is_none());
        let all = parse(&["--json", "disk", "--smoke"]).unwrap().unwrap();
        assert!(all.json == Some("disk".into()) && all.effort == Effort::Smoke);
        assert!(GROUPS.iter().all(|group| all.includes(group.name)));
        let some = parse(&["disk", "net"]).unwrap().unwrap();
        assert!(some.includes("net") && !some.includes("linux") && some.json.is_none());
    }

    #[test]
    fn a_file_for_rows_is_tried_before_anything_is_measured_and_keeps_what_it_has() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rows.json");
        std::fs::write(&path, "older rows").unwrap();
        open_json(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"older rows");
        let refused = open_json(&directory.path().join("none/rows.json")).unwrap_err();
        assert!(refused.contains("none/rows.json cannot be written"), "{refused}");
    }
}
