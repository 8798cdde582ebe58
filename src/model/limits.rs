//! Bounds of what a caller may send, each with the reason for its size.

/// Largest JSON request body in bytes: user data at its limit, escaped, plus a full server.
pub const BODY_BYTES_MAX: usize = 256 * 1024;

/// Longest name: one DNS label (RFC 1035, section 2.3.4), because names become host names.
pub const NAME_CHARS_MAX: usize = 63;

/// Most labels of one resource: enough for selectors, small enough to list.
pub const LABELS_MAX: usize = 32;

/// Longest label key or value in characters.
pub const LABEL_CHARS_MAX: usize = 63;

/// Longest cloud-init user data in bytes, as the large clouds allow (64 KiB).
pub const USER_DATA_BYTES_MAX: usize = 64 * 1024;

/// Most ssh keys of one server.
pub const SSH_KEYS_MAX: usize = 64;

/// Longest ssh public key line in bytes: an RSA 16384 key is 2.8 KiB.
pub const SSH_KEY_BYTES_MAX: usize = 8 * 1024;

/// Longest `external_ref` in characters.
pub const EXTERNAL_REF_CHARS_MAX: usize = 128;

/// Longest description in characters.
pub const DESCRIPTION_CHARS_MAX: usize = 1024;

/// Longest idempotency key in characters.
pub const IDEMPOTENCY_KEY_CHARS_MAX: usize = 128;

/// Most items of one page.
pub const PAGE_ITEMS_MAX: u32 = 200;

/// Most servers of one clone of a snapshot: what one transaction makes in a moment.
pub const CLONES_MAX: u16 = 100;

/// Most servers of one action on all that a selector matches: what one transaction carries out in a moment.
pub const BULK_SERVERS_MAX: u32 = PAGE_ITEMS_MAX;

/// Items of a page when the caller does not say.
pub const PAGE_ITEMS_DEFAULT: u32 = 50;

/// Longest wait a request may ask for, in seconds: below the idle timeout of common proxies.
pub const WAIT_S_MAX: u64 = 60;

/// Longest grace of a stop, in seconds.
pub const GRACE_S_MAX: u64 = 3600;

/// Most hosts of one baseline: at some 3 KB each they fit into a body.
pub const BASELINE_HOSTS_MAX: usize = 64;

/// Virtual CPUs of one server.
pub const VCPUS_MAX: u8 = 32;

/// Least memory of one server in bytes.
pub const MEMORY_BYTES_MIN: u64 = 64 << 20;

/// Most memory of one server in bytes.
pub const MEMORY_BYTES_MAX: u64 = 1 << 40;

/// What the memory of a server is counted in, in bytes: the size of a huge page.
pub const MEMORY_STEP_BYTES: u64 = 2 << 20;

/// Least size of a volume in bytes.
pub const VOLUME_BYTES_MIN: u64 = 1 << 20;

/// Most size of a volume in bytes: ext4's limit for one file.
pub const VOLUME_BYTES_MAX: u64 = 16 << 40;

/// Most interfaces of one server.
pub const NICS_MAX: usize = 8;

/// Most volumes of one server: the one that it is made with, if any. No other can be attached.
pub const VOLUMES_MAX: usize = 1;
