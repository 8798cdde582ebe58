//! Bounds of images, each with the reason for its size.
use std::time::Duration;

/// Longest manifest in bytes: a full desktop has 3,000 packages, and each takes 80 bytes.
pub const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// Most packages a manifest lists.
pub const PACKAGES_MAX: usize = 16_384;

/// Longest text of a manifest in characters, but for the command line and the description.
pub const TEXT_CHARS_MAX: usize = 256;

/// Longest description in characters.
pub const DESCRIPTION_CHARS_MAX: usize = 4096;

/// Longest words about a manifest that cannot be read, in characters: they quote it, and go into the operation.
pub const COMPLAINT_CHARS_MAX: usize = 512;

/// Longest file name of an image in bytes.
pub const FILE_NAME_BYTES_MAX: usize = 64;

/// Largest kernel in bytes: ten times a distribution's.
pub const KERNEL_BYTES_MAX: u64 = 256 << 20;

/// Largest initial RAM disk in bytes: it must fit into a server's memory beside everything else.
pub const INITRD_BYTES_MAX: u64 = 1 << 30;

/// Largest disk of an image in bytes. Larger data belongs on volumes.
pub const DISK_BYTES_MAX: u64 = 1 << 40;

/// Bytes that may follow the end mark of a bundle: tar pads to its record, at most 512 blocks of 512 bytes.
pub const BUNDLE_PADDING_BYTES_MAX: u64 = 512 * 512;

/// Bytes read and hashed in one go.
pub const PIECE_BYTES: usize = 256 << 10;

/// Zeros of this many bytes, aligned, become a hole: the block of every common file system.
pub const HOLE_BYTES: usize = 4096;

/// Imports at work at once: each fills a core with hashing and the disk with writing.
pub const IMPORTS_MAX: usize = 4;

/// How often an import's progress is recorded.
pub const PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// Longest line of a recipe's output that is kept, in bytes.
pub const RECIPE_LINE_BYTES_MAX: usize = 4096;

/// Lines of a recipe's output that are kept for the error message.
pub const RECIPE_LINES_KEPT: usize = 10;

/// Longest build of a recipe: the mirror may be slow, but not for ever.
pub const RECIPE_MAX: Duration = Duration::from_secs(2 * 3600);

/// How long a recipe may clean up after it was asked to end.
pub const RECIPE_GRACE: Duration = Duration::from_secs(20);

/// Largest catalogue file in bytes; it is written by hand.
pub const CATALOGUE_BYTES_MAX: u64 = 1 << 20;
