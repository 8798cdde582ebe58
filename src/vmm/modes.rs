//! The modes of the program: which descriptors each takes, and what becomes of its result. Arguments are few
//! and read by hand, because programs give them.
use std::error::Error;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use sys::inherited;
use wire::launch::fd;

use crate::{control, launcher, log, probe};

const USAGE: &str = "usage: toft-vmm launcher | machine [--label TEXT] | probe [--kvm PATH] | --version";

/// Runs the mode that the arguments name. Exit codes: 0 done, 1 failed (the log says why), 2 used wrongly.
pub fn main(arguments: &[String]) -> ExitCode {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["launcher"] => launch(),
        // The label is for `ps`; nothing is derived from it.
        ["machine"] | ["machine", "--label", _] => machine(),
        ["probe"] => probe_inherited(),
        ["probe", "--kvm", path] => probe::run_path(path).map_err(Into::into),
        ["--version"] => {
            println!("toft-vmm {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("toft-vmm: {}", log::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

type Done = Result<(), Box<dyn Error>>;

fn launch() -> Done {
    Ok(launcher::run(take(fd::CONTROL)?)?)
}

fn machine() -> Done {
    let (control, kvm, will) = (take(fd::CONTROL)?, take(fd::KVM)?, take(fd::WILL)?);
    // Nothing is there where nobody has given it.
    let offer = inherited::take(fd::OFFER).ok();
    Ok(control::run(control::Inheritance { control, kvm, will, offer })?)
}

fn probe_inherited() -> Done {
    Ok(probe::run(take(fd::KVM)?)?)
}

fn take(number: i32) -> Result<OwnedFd, Box<dyn Error>> {
    inherited::take(number).map_err(|error| format!("descriptor {number}: {error}; {USAGE}").into())
}
