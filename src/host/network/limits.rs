//! Bounds of networks, each with the reason for its size.

use std::time::Duration;

/// Shortest prefix of a network: 65,533 servers, more than one host can run.
pub const PREFIX_MIN: u8 = 16;

/// Longest prefix of a network: the smallest range with more than one address for servers worth having.
pub const PREFIX_MAX: u8 = 29;

/// Prefix of a network whose range Toft chooses.
pub const PREFIX_CHOSEN: u8 = 24;

/// Bridges are numbered below this; more networks than that on one host is a mistake.
pub const BRIDGES_MAX: u32 = 4096;

/// Longest run of `nft`: it takes milliseconds, unless the machine is in deep trouble.
pub const NFT_MAX: Duration = Duration::from_secs(20);

/// Firewall chains of others that are looked at: more than any firewall has at one hook.
pub const FOREIGN_CHAINS_MAX: usize = 16;

/// Bytes read of the kernel's answers at once: room for all that one change of rules can have.
pub const ACK_BYTES_MAX: usize = 8 << 10;

/// Longest datagram of a dump: what the kernel makes of them at most (`NLMSG_GOODSIZE` to 32 KiB), with room to spare.
pub const ANSWER_BYTES_MAX: usize = 64 << 10;

/// How often a list is asked for that changes while it is told.
pub const DUMPS_MAX: usize = 8;

/// What is kept of what `nft` and `dnsmasq` say about a failure, in bytes: enough for a person.
pub const COMPLAINT_BYTES_MAX: usize = 2048;

/// Longest wait for dnsmasq to have started (it returns when it serves) or ended.
pub const DNSMASQ_MAX: Duration = Duration::from_secs(10);

/// Looks for a dnsmasq that nobody recorded: it forks twice as it starts, so the fourth look finds none.
pub const UNRECORDED_LOOKS_MAX: u32 = 8;

/// Tries to find a MAC that no interface has: with 16 million of them each try nearly always succeeds.
pub const MAC_TRIES_MAX: u32 = 64;

/// How many servers start on a network while one that was promised its tap is not plugged in, until that is another's: more than are
/// made at once, so that one is to stay off, or is gone.
pub const PASSED_MAX: u32 = 16;

/// How long DHCP and DNS stay behind the records. Servers that start wait for them by themselves, and of those that were made
/// at the same time the first has told dnsmasq of all.
pub const SERVE_AFTER: Duration = Duration::from_millis(20);

/// They stay so many times as long behind as following takes, which grows with the number of servers: it is a fifth of a
/// processor's work at most.
pub const SERVE_PARTS: u32 = 4;

/// Longest time that they stay behind: what a person who has just renamed a server does not notice.
pub const SERVE_AFTER_MAX: Duration = Duration::from_millis(500);

/// Length of a DHCP lease in seconds. Addresses are fixed, so leases only say how often a guest asks again.
pub const LEASE_S: u32 = 3600;

/// Longest name of a network device (IFNAMSIZ of linux/if.h, with its NUL).
pub(super) const DEVICE_NAME_MAX: usize = 15;

/// Largest packet on a network in bytes: Ethernet's, which every uplink carries.
pub const MTU: u16 = 1500;

/// How often everything is looked at again unasked: the longest time that flushed rules or a dead DHCP server
/// go unnoticed. One pass costs a few milliseconds.
pub const SETTLE_EVERY: Duration = Duration::from_secs(60);

/// Pause after a pass that failed, as when the disk is full, or left a network degraded.
pub const SETTLE_AGAIN: Duration = Duration::from_secs(2);

/// How often dnsmasq is started again when its address is still that of one that was killed, and the pause before it: one
/// second in all, in which the kernel closes the sockets of a process on the busiest host.
pub const SOCKETS_TRIES: u32 = 20;

/// See [`SOCKETS_TRIES`].
pub const SOCKETS_AGAIN: Duration = Duration::from_millis(50);
