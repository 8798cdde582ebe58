//! Files that appear whole or not at all: written beside their place under another name, flushed, then renamed; or renamed and
//! then flushed with their name, for those that a record vouches for only after that.
//! It knows no volumes. Every module of this room that writes files uses it.
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What holes are counted in, in bytes.
const PIECE_BYTES: usize = 4096;

/// Ends the name of a file that is being written. Nothing that a crash leaves under such a name is worth keeping.
pub(crate) const UNFINISHED: &str = ".unfinished";

/// Ends the name of a file that lies beside the one whose place it takes when that may go.
pub(crate) const BESIDE: &str = ".beside";

/// Where a file lies that is to take the place of this one.
pub(crate) fn beside(place: &Path) -> PathBuf {
    let mut name = place.as_os_str().to_owned();
    name.push(BESIDE);
    PathBuf::from(name)
}

/// What a file is to outlive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durability {
    /// A loss of power. Waiting for the disk costs a millisecond or more.
    Power,
    /// A loss of power, once it is flushed ([`flush_in_place`]). Until then it may be lost, but not in part: its content is on the medium
    /// before it has its name, and ext4 and XFS keep that order in their journals.
    Pending,
    /// The daemon: whoever needs it after a loss of power makes it anew.
    Process,
}

/// Replaces `path` by a file of these bytes that its owner alone can read. Whole pieces of zeros become holes.
pub(crate) fn replace(path: &Path, content: &[u8], durability: Durability) -> io::Result<()> {
    let pieces = (0..).step_by(PIECE_BYTES).zip(content.chunks(PIECE_BYTES));
    let data = pieces.filter(|(_, piece)| piece.iter().any(|byte| *byte != 0));
    replace_by(path, content.len() as u64, data, durability)
}

/// As [`replace`], by a file of so many bytes with these pieces, each with its offset, and holes between them.
pub(crate) fn replace_by<'a>(
    path: &Path,
    length: u64,
    pieces: impl Iterator<Item = (u64, &'a [u8])>,
    durability: Durability,
) -> io::Result<()> {
    let mut unfinished = Unfinished::create(path)?;
    let file = unfinished.file();
    file.set_len(length)?;
    for (at, piece) in pieces {
        file.write_all_at(piece, at)?;
    }
    match durability {
        Durability::Power => unfinished.finish(),
        Durability::Pending => unfinished.begin(),
        Durability::Process => unfinished.take_place(),
    }
}

/// A file that takes its place with [`Unfinished::finish`]; dropped before, it is removed.
pub(crate) struct Unfinished {
    file: File,
    path: PathBuf,
    place: PathBuf,
    finished: bool,
}

impl Unfinished {
    /// Starts a file that is to lie at `place`, in place of what an earlier try left.
    pub(crate) fn create(place: &Path) -> io::Result<Unfinished> {
        let mut path = place.as_os_str().to_owned();
        path.push(UNFINISHED);
        let path = PathBuf::from(path);
        remove(&path)?;
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        Ok(Unfinished { file, path, place: place.to_owned(), finished: false })
    }

    /// To write to.
    pub(crate) fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Flushes it to the disk and gives it its place.
    pub(crate) fn finish(self) -> io::Result<()> {
        self.file.sync_all()?;
        let place = self.place.clone();
        self.take_place()?;
        sync_parent(&place)
    }

    /// Gives it its place, then flushes both: for whoever vouches for the file only when that is done. The file system writes name and
    /// content down in one go, where [`Unfinished::finish`] waits for two.
    pub(crate) fn finish_in_place(self) -> io::Result<()> {
        let (file, place) = (self.file.try_clone()?, self.place.clone());
        self.begin()?;
        flush_in_place(&file, &place).inspect_err(|_| {
            // Whoever begins again replaces what cannot be removed now.
            let _ = fs::remove_file(&place);
        })
    }

    /// Gives it its place when its content is on the medium, which nothing vouches for yet.
    pub(crate) fn begin(self) -> io::Result<()> {
        sys::writeback::write_out(&self.file)?;
        self.take_place()
    }

    /// Gives it its place, flushed or not.
    pub(crate) fn take_place(mut self) -> io::Result<()> {
        fs::rename(&self.path, &self.place)?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.finished {
            // The next start removes what cannot be removed now.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Flushes a file that was begun, and its name. For a directory ext4 commits everything that is under way on the file system by then, for a
/// file only what concerns it. So the directory comes first, and with it a file whose blocks are known: nothing is left to commit for
/// that one.
pub(crate) fn flush_in_place(file: &File, place: &Path) -> io::Result<()> {
    sync_parent(place)?;
    file.sync_all()
}

/// Puts the file that lies beside `place` in it, for good. Repeatable: where none lies, it has been done.
pub(crate) fn take_beside(place: &Path) -> io::Result<()> {
    match fs::rename(beside(place), place) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
        other => other?,
    }
    sync_parent(place)
}

/// Makes names in the directory of `path` last through a power failure.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Removes a file; that there is none is no error.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes a directory with all that is in it; that there is none is no error.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
