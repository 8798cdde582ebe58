//! What a machine is built from, kept for as long as its process lives: the specification with the limits in
//! force, and every descriptor. A reset builds from the same.
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use wire::machine::{FdIndex, MachineSpec};

use super::Error;

/// Specification and descriptors.
pub(super) struct Plan {
    pub(super) spec: MachineSpec,
    /// By their positions in the packet. Absent are those that are not the machine's.
    files: Vec<Option<File>>,
}

impl Plan {
    /// Fails with the field when the specification does not hold for these descriptors.
    pub(super) fn new(spec: MachineSpec, descriptors: Vec<Option<OwnedFd>>) -> Result<Plan, Error> {
        check(&spec, descriptors.len())?;
        Ok(Plan { spec, files: descriptors.into_iter().map(|file| file.map(File::from)).collect() })
    }

    /// Changes the specification, if the result still holds.
    pub(super) fn change(&mut self, change: impl FnOnce(&mut MachineSpec)) -> Result<(), Error> {
        let mut changed = self.spec.clone();
        change(&mut changed);
        check(&changed, self.files.len())?;
        self.spec = changed;
        Ok(())
    }

    /// The file at a position of the packet.
    pub(super) fn file(&self, FdIndex(at): FdIndex) -> io::Result<&File> {
        let file = self.files.get(usize::from(at)).and_then(Option::as_ref);
        file.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// A descriptor of one's own for the same open file.
    pub(super) fn copy(&self, at: FdIndex) -> io::Result<File> {
        self.file(at)?.try_clone()
    }

    pub(super) fn console(&self) -> io::Result<File> {
        self.copy(self.spec.console.ring)
    }
}

fn check(spec: &MachineSpec, descriptors: usize) -> Result<(), Error> {
    spec.check(descriptors).map_err(|error| Error::Invalid { field: error.field, detail: error.detail })
}
