//! One virtual machine per process, and the launcher that starts them. Modes are for programs: descriptors come
//! by the numbers of `wire::launch::fd`. A person runs `toft-vmm probe --kvm /dev/kvm`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    vmm::main(&arguments)
}
