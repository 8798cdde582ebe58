//! The cloud-init NoCloud disk of a server: host name, keys, user data, network. A small FAT file system.
//! Pure but for writing one file. Called by `servers` before each start.
use std::net::Ipv4Addr;
use std::path::Path;

use model::{Code, Name, ServerId};

use crate::error::{Error, Result};

/// What the guest is told.
#[derive(Debug, Clone)]
pub struct Seed<'a> {
    /// The instance id: cloud-init does its first-boot work once per id.
    pub server: ServerId,
    /// Host name.
    pub name: &'a Name,
    /// User that the keys are given to.
    pub default_user: &'a str,
    /// Public keys.
    pub ssh_keys: &'a [String],
    /// User data as the caller sent it.
    pub user_data: Option<&'a str>,
    /// Interfaces, in order.
    pub nics: Vec<SeedNic>,
}

/// One interface.
#[derive(Debug, Clone)]
pub struct SeedNic {
    /// Hardware address.
    pub mac: String,
    /// Its address.
    pub ipv4: Ipv4Addr,
    /// Prefix length.
    pub prefix: u8,
    /// Gateway and DNS.
    pub gateway: Ipv4Addr,
    /// Largest packet in bytes.
    pub mtu: u16,
    /// Whether the gateway reaches the world.
    pub routed: bool,
}

/// Writes the disk to `path`, replacing what is there in one step.
pub fn write(path: &Path, seed: &Seed<'_>) -> Result<()> {
    let _ = (path, seed);
    Err(Error::new(Code::HostUnprepared, "seeds are not built yet"))
}
