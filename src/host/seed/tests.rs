use std::io::{Cursor, Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;

use uuid::Uuid;

use super::*;

const USER_DATA: &str = "#!/bin/sh\r\necho ünïcode\n\n";

struct Owned {
    name: Name,
    keys: Vec<String>,
    user_data: Option<String>,
    nics: Vec<SeedNic>,
}

impl Owned {
    fn new() -> Owned {
        Owned {
            name: "web1".parse().unwrap(),
            keys: vec!["ssh-ed25519 AAAA someone's \"key\": #1".to_owned()],
            user_data: Some(USER_DATA.to_owned()),
            nics: vec![
                nic("52:54:00:00:00:01", "10.1.0.2", false),
                nic("52:54:00:00:00:02", "10.2.0.2", true),
                nic("52:54:00:00:00:03", "10.3.0.2", true),
            ],
        }
    }

    fn seed(&self) -> Seed<'_> {
        Seed {
            server: ServerId(Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_dead_beef)),
            name: &self.name,
            default_user: "debian",
            ssh_keys: &self.keys,
            user_data: self.user_data.as_deref(),
            nics: self.nics.clone(),
            descent: 0,
        }
    }

    fn disk(&self) -> Vec<u8> {
        bytes(&self.seed())
    }
}

fn bytes(seed: &Seed<'_>) -> Vec<u8> {
    let mut disk = seed.disk().unwrap();
    let mut bytes = Vec::new();
    disk.seek(SeekFrom::Start(0)).unwrap();
    disk.read_to_end(&mut bytes).unwrap();
    bytes
}

fn nic(mac: &str, ipv4: &str, routed: bool) -> SeedNic {
    let ipv4: Ipv4Addr = ipv4.parse().unwrap();
    let [a, b, c, _] = ipv4.octets();
    SeedNic { mac: mac.to_owned(), ipv4, prefix: 24, gateway: [a, b, c, 1].into(), routed, mtu: 1500 }
}

fn file(disk: &[u8], name: &str) -> String {
    let volume = FileSystem::new(Cursor::new(disk.to_vec()), FsOptions::new()).unwrap();
    let mut text = String::new();
    volume.root_dir().open_file(name).unwrap().read_to_string(&mut text).unwrap();
    text
}

#[test]
fn the_label_is_the_one_cloud_init_looks_for() {
    let disk = Owned::new().disk();
    let volume = FileSystem::new(Cursor::new(disk.clone()), FsOptions::new()).unwrap();
    assert_eq!(volume.volume_label(), "CIDATA");
    assert_eq!(volume.read_volume_label_from_root_dir().unwrap().as_deref(), Some("CIDATA"));
    assert_eq!(disk.len() % 512, 0);
}

#[test]
fn user_data_arrives_byte_for_byte_beside_the_keys() {
    let disk = Owned::new().disk();
    assert_eq!(file(&disk, "user-data"), USER_DATA);
    let meta_data = file(&disk, "meta-data");
    let wanted = "instance-id: 01900000-0000-7000-8000-0000deadbeef\nlocal-hostname: web1\ndefault-user: \
                  \"debian\"\npublic-keys: [\"ssh-ed25519 AAAA someone's \\\"key\\\": #1\"]\n";
    assert_eq!(meta_data, wanted);
}

#[test]
fn without_user_data_an_empty_cloud_config_stands_in() {
    let disk = Owned { user_data: None, ..Owned::new() }.disk();
    assert_eq!(file(&disk, "user-data"), "#cloud-config\n{}\n");
}

#[test]
fn only_the_first_interface_with_a_way_out_gets_the_default_route() {
    let config: Value = serde_json::from_str(&file(&Owned::new().disk(), "network-config")).unwrap();
    let ethernets = &config["ethernets"];
    assert_eq!(config["version"], 2);
    assert_eq!(ethernets["eth0"]["match"]["macaddress"], "52:54:00:00:00:01");
    assert_eq!(ethernets["eth0"]["addresses"], json!(["10.1.0.2/24"]));
    assert_eq!(ethernets["eth0"]["nameservers"]["addresses"], json!(["10.1.0.1"]));
    assert_eq!(ethernets["eth0"].get("routes"), None);
    assert_eq!(ethernets["eth1"]["routes"], json!([{ "to": "0.0.0.0/0", "via": "10.2.0.1" }]));
    assert_eq!(ethernets["eth2"].get("routes"), None);
}

#[test]
fn the_same_description_gives_the_same_bytes_and_another_differs() {
    assert_eq!(Owned::new().disk(), Owned::new().disk());
    assert_ne!(Owned { name: "web2".parse().unwrap(), ..Owned::new() }.disk(), Owned::new().disk());
}

#[test]
fn everything_at_its_limit_fits() {
    let full = Owned {
        keys: vec!["k".repeat(model::limits::SSH_KEY_BYTES_MAX); model::limits::SSH_KEYS_MAX],
        user_data: Some("u".repeat(model::limits::USER_DATA_BYTES_MAX)),
        nics: vec![nic("52:54:00:00:00:01", "10.1.0.2", true); model::limits::NICS_MAX],
        ..Owned::new()
    };
    assert_eq!(file(&full.disk(), "user-data").len(), model::limits::USER_DATA_BYTES_MAX);
}

#[test]
fn the_file_is_replaced_as_a_whole_and_private() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("seed.img");
    let mut owned = Owned::new();
    write(&path, &owned.seed()).unwrap();
    owned.name = "web2".parse().unwrap();
    write(&path, &owned.seed()).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), owned.disk());
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn a_clone_has_a_seed_of_another_size_than_the_server_it_goes_on_from() {
    let sample = Owned::new();
    let sizes: Vec<usize> = (0..20).map(|descent| bytes(&Seed { descent, ..sample.seed() }).len()).collect();
    assert!(sizes.windows(2).all(|pair| pair[0] != pair[1]), "{sizes:?}");
    assert!(sizes.iter().all(|size| size.is_multiple_of(512) && *size < SEED_BYTES * 2));
}
