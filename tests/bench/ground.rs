//! What a run stands on: the programs it measures, how much effort it makes, and the machine in words.
//! It starts nothing but `toft-vmm probe`. Every group is given it.
use std::path::{Path, PathBuf};
use std::process::Command;

/// How many samples are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effort {
    /// Enough to tell medians apart.
    Full,
    /// As few as show that everything runs.
    Smoke,
}

/// What KVM here can run.
#[derive(Debug)]
pub(crate) enum KvmKind {
    /// Linux guests.
    Linux,
    /// Bare guests only; the sentence says what Linux lacks.
    Probe(String),
}

/// The programs and the machine.
pub(crate) struct Ground {
    pub(crate) effort: Effort,
    pub(crate) kvm: KvmKind,
    /// The directory of `toft`, `toftd` and `toft-vmm`.
    pub(crate) binaries: PathBuf,
    /// Where disks and daemons have their files: on a file system that nothing else uses, where scripts/lib/own-disk has
    /// made one, else on the host's. Not `/tmp`, which may be memory and holds everybody's.
    pub(crate) files: PathBuf,
}

impl Ground {
    pub(crate) fn new(effort: Effort) -> Ground {
        let binaries = given("TOFT_BIN");
        let kvm = kvm_kind(&binaries.join("toft-vmm"));
        let files = std::env::var_os("TOFT_BENCH_DIR").map_or_else(|| "/var/tmp".into(), PathBuf::from);
        Ground { effort, kvm, binaries, files }
    }

    /// The probe guest's ELF file.
    pub(crate) fn probe(&self) -> PathBuf {
        given("TOFT_PROBE")
    }

    /// The program made from floor.c.
    pub(crate) fn floor(&self) -> PathBuf {
        given("TOFT_FLOOR")
    }

    /// The program made from mover.c.
    pub(crate) fn mover(&self) -> PathBuf {
        given("TOFT_MOVER")
    }

    /// The directory of the image with Linux.
    pub(crate) fn linux(&self) -> PathBuf {
        given("TOFT_BENCH_IMAGE")
    }

    /// `full` samples, or `smoke` where nothing is measured.
    pub(crate) fn samples(&self, full: usize, smoke: usize) -> usize {
        match self.effort {
            Effort::Full => full,
            Effort::Smoke => smoke,
        }
    }

    /// A program on PATH.
    pub(crate) fn on_path(&self, name: &str) -> Option<PathBuf> {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|folder| folder.join(name)).find(|program| program.is_file())
    }

    /// QEMU, which scripts/bench installs.
    pub(crate) fn qemu(&self) -> PathBuf {
        self.on_path("qemu-system-x86_64").expect("qemu-system-x86_64 is not on PATH: run scripts/bench")
    }

    /// The machine, for the head of the table.
    pub(crate) fn words(&self) -> String {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap_or("unknown");
        let meminfo = read("/proc/meminfo");
        let kib = meminfo.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
        let kind = match self.kvm {
            KvmKind::Linux => "runs Linux guests",
            KvmKind::Probe(_) => "runs bare guests natively, but not Linux",
        };
        let effort = match self.effort {
            Effort::Full => "",
            Effort::Smoke => "\nA smoke run: these figures mean nothing.",
        };
        let files = std::env::var("TOFT_BENCH_FILES").unwrap_or_else(|_| "the host's own".to_owned());
        format!(
            "{model}, {} CPUs, {} GiB, Linux {}; KVM {kind}.\nFile system of disks and daemons: {files}.{effort}",
            cpuinfo.matches("processor\t:").count(),
            kib >> 20,
            read("/proc/sys/kernel/osrelease").trim()
        )
    }
}

/// A path that scripts/bench hands over.
fn given(variable: &str) -> PathBuf {
    std::env::var_os(variable).unwrap_or_else(|| panic!("{variable} is not set: run scripts/bench")).into()
}

fn kvm_kind(vmm: &Path) -> KvmKind {
    let output = Command::new(vmm).args(["probe", "--kvm", "/dev/kvm"]).output();
    let output = output.unwrap_or_else(|error| panic!("{} cannot be started: {error}", vmm.display()));
    assert!(
        output.status.success(),
        "KVM cannot be used: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    match serde_json::from_slice::<wire::launch::KvmReport>(&output.stdout).expect("a report").linux {
        wire::launch::LinuxSupport::Yes => KvmKind::Linux,
        wire::launch::LinuxSupport::No(why) => KvmKind::Probe(why),
    }
}
