//! Taps: Ethernet interfaces whose other end is a descriptor (kernel: Documentation/networking/tuntap.rst). It
//! knows no bridges, addresses or namespaces. `host` creates them, `devices::virtio::net` sets their offloads.
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// Length of the virtio network header before each packet (virtio 1.2, section 5.1.6: with `num_buffers`).
pub const VNET_HEADER_BYTES: usize = 12;

/// Longest name of an interface (IFNAMSIZ without the terminator).
pub const NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;

/// What a tap has to be for a machine: Ethernet frames, no packet information, a virtio header before each.
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// What the reader of a tap can finish itself. Packets that need anything else are finished by the kernel first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Checksums left to the receiver.
    pub checksum: bool,
    /// TCP over IPv4 in one packet of up to 64 KiB. Needs `checksum`.
    pub tso4: bool,
    /// TCP over IPv6 in one packet of up to 64 KiB. Needs `checksum`.
    pub tso6: bool,
}

/// A tap that lasts as long as its descriptor.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    name: String,
}

impl Tap {
    /// Creates an interface of this name in the caller's network namespace and opens it, non-blocking and closed
    /// on exec, with a header of [`VNET_HEADER_BYTES`] and no offloads. Needs CAP_NET_ADMIN. Fails with
    /// `InvalidInput` for a name no interface can have, and with EBUSY when a tap of that name is open elsewhere.
    pub fn create(name: &str) -> io::Result<Tap> {
        let mut request = request_for(name)?;
        request.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")?;
        let fd = OwnedFd::from(file);
        // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
        let length = VNET_HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which `length` is.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const length) })?;
        set_offloads(fd.as_fd(), Offloads::default())?;
        Ok(Tap { fd, name: name.to_owned() })
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Tap> for OwnedFd {
    fn from(tap: Tap) -> OwnedFd {
        tap.fd
    }
}

/// Tells the kernel what the reader of `tap` can finish itself. Fails with `InvalidInput` for segmentation without
/// checksums, and with the kernel's error when `tap` is no tap.
pub fn set_offloads(tap: BorrowedFd<'_>, offloads: Offloads) -> io::Result<()> {
    let Offloads { checksum, tso4, tso6 } = offloads;
    if (tso4 || tso6) && !checksum {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "segmentation offload needs checksum offload",
        ));
    }
    let flags = [(checksum, libc::TUN_F_CSUM), (tso4, libc::TUN_F_TSO4), (tso6, libc::TUN_F_TSO6)];
    let set = flags.iter().filter(|(on, _)| *on).fold(0, |set, (_, flag)| set | flag);
    // SAFETY: TUNSETOFFLOAD takes its argument by value and no pointer.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(set)) })
}

/// Checks that `tap` is what [`Tap::create`] makes, and says what is not.
pub fn inspect(tap: BorrowedFd<'_>) -> io::Result<()> {
    let mut request = empty_request();
    // SAFETY: TUNGETIFF writes one ifreq, which `request` is.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
    // SAFETY: TUNGETIFF has set the flags, and every pattern of bits is a number.
    let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
    let wrong = |what: String| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    if flags & FLAGS != FLAGS {
        return wrong(format!(
            "the tap's flags are {flags:#x}; IFF_TAP, IFF_NO_PI and IFF_VNET_HDR are needed"
        ));
    }
    let mut length: libc::c_int = 0;
    // SAFETY: TUNGETVNETHDRSZ writes one int, which `length` is.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETVNETHDRSZ, &raw mut length) })?;
    if usize::try_from(length) != Ok(VNET_HEADER_BYTES) {
        return wrong(format!("the tap's header has {length} bytes; {VNET_HEADER_BYTES} are needed"));
    }
    Ok(())
}

/// The kernel would read `%d` as a pattern, and refuses `/`, blanks and the names of directories.
fn request_for(name: &str) -> io::Result<libc::ifreq> {
    let right = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b'%' | b':');
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.starts_with('.') || !name.bytes().all(right) {
        let detail = format!("{name:?} is no name for an interface: 1 to {NAME_BYTES_MAX} letters or digits");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, detail));
    }
    let mut request = empty_request();
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

fn empty_request() -> libc::ifreq {
    // SAFETY: an ifreq is numbers and pointers in a union, for all of which zero is a value.
    unsafe { std::mem::zeroed() }
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
