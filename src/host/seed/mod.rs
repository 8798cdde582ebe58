//! The cloud-init NoCloud disk of a server: host name, keys, user data, network. A small FAT file system.
//! Pure but for writing one file: the same description gives the same bytes. It knows no records.
//! Called by `servers` before each start.
//!
//! The caller's user data is stored byte for byte. Keys travel in `meta-data` as `public-keys`, which cloud-init
//! gives to the image's default user whatever the user data is (DataSource and cc_ssh of cloud-init 22.4).
//! Addresses are static, so that a server has its address even while DHCP is away.
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::path::Path;

use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions};
use model::{Name, ServerId};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::network::DOMAIN;
use crate::volumes::files::{self, Durability};

mod sparse;

use sparse::Sparse;

/// Size of the disk in bytes. User data, keys and interfaces at their limits (64 KiB, 64 × 8 KiB, 8) fill less
/// than two thirds of it.
pub const SEED_BYTES: usize = 1 << 20;

/// Sizes that seeds of one descent go through, one after the other: only neighbours have to differ.
const SIZES: u32 = 8;

/// What each is larger than the one before, in bytes.
const SIZE_STEP: usize = 4096;

/// Label that cloud-init looks for, padded as FAT stores it.
const LABEL: [u8; 11] = *b"CIDATA     ";

/// What the guest is told.
#[derive(Debug, Clone)]
pub struct Seed<'a> {
    /// The instance id: cloud-init does its first-boot work once per id.
    pub server: ServerId,
    /// Host name.
    pub name: &'a Name,
    /// User that the keys are given to. cloud-init knows it from the image; simpler images may read it.
    pub default_user: &'a str,
    /// Public keys.
    pub ssh_keys: &'a [String],
    /// User data as the caller sent it.
    pub user_data: Option<&'a str>,
    /// Interfaces, in order.
    pub nics: Vec<SeedNic>,
    /// How many clones with memory lead to the server. The disk has another size than that of the one it was cloned from,
    /// by which a guest's kernel is told that there is something new to read.
    pub descent: u32,
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
    /// Whether the gateway reaches the world. The first interface whose gateway does gets the default route.
    pub routed: bool,
}

/// Writes the disk to `path`, replacing what is there in one step. The new file is readable by its owner alone,
/// because user data often holds secrets.
pub fn write(path: &Path, seed: &Seed<'_>) -> Result<()> {
    let disk =
        seed.disk().map_err(|cause| Error::internal("the server's cloud-init data does not fit", cause))?;
    // It is written again before the next start, so it need not outlive the power.
    let replaced = files::replace_by(path, disk.length(), disk.pieces(), Durability::Process);
    replaced.map_err(|cause| Error::file(format!("cannot write {}", path.display()), cause))
}

impl Seed<'_> {
    /// The disk. Fails only when the data does not fit, which the model's limits rule out.
    fn disk(&self) -> io::Result<Sparse> {
        let mut disk = Sparse::new(SEED_BYTES + (self.descent % SIZES) as usize * SIZE_STEP);
        let options = FormatVolumeOptions::new()
            .fat_type(FatType::Fat12)
            .bytes_per_cluster(4096)
            .volume_label(LABEL)
            .volume_id(self.volume_id());
        fatfs::format_volume(&mut disk, options)?;
        let volume = FileSystem::new(&mut disk, FsOptions::new())?;
        for (name, content) in self.files() {
            let mut file = volume.root_dir().create_file(name)?;
            file.write_all(content.as_bytes())?;
            file.flush()?;
        }
        volume.unmount()?;
        Ok(disk)
    }

    /// Name and content of each file. Values are JSON, which is YAML that no name or key can break out of.
    fn files(&self) -> [(&'static str, String); 3] {
        [
            ("meta-data", self.meta_data()),
            ("user-data", self.user_data.unwrap_or("#cloud-config\n{}\n").to_owned()),
            ("network-config", format!("{:#}\n", self.network_config())),
        ]
    }

    /// One key on each line, because `tiny` reads `local-hostname` with sed.
    fn meta_data(&self) -> String {
        format!(
            "instance-id: {}\nlocal-hostname: {}\ndefault-user: {}\npublic-keys: {}\n",
            self.server,
            self.name,
            Value::from(self.default_user),
            Value::from(self.ssh_keys)
        )
    }

    /// Network configuration version 2 of cloud-init.
    fn network_config(&self) -> Value {
        let way_out = self.nics.iter().position(|nic| nic.routed);
        let ethernets = self.nics.iter().enumerate().map(|(at, nic)| {
            let mut interface = json!({
                "match": { "macaddress": nic.mac },
                "set-name": format!("eth{at}"),
                "dhcp4": false,
                "dhcp6": false,
                "mtu": nic.mtu,
                "addresses": [format!("{}/{}", nic.ipv4, nic.prefix)],
                "nameservers": { "addresses": [nic.gateway], "search": [DOMAIN] },
            });
            if way_out == Some(at) {
                // Spelt out, because not every renderer of cloud-init 22.4 knows `default`.
                interface["routes"] = json!([{ "to": "0.0.0.0/0", "via": nic.gateway }]);
            }
            (format!("eth{at}"), interface)
        });
        json!({ "version": 2, "ethernets": ethernets.collect::<serde_json::Map<_, _>>() })
    }

    /// FAT's serial number: the random end of the server's id, so that it is neither constant nor changing.
    fn volume_id(&self) -> u32 {
        let [.., a, b, c, d] = *self.server.0.as_bytes();
        u32::from_be_bytes([a, b, c, d])
    }
}

#[cfg(test)]
mod tests;
