//! The checks a specification passes before anything is built from it.
use super::*;

fn spec() -> MachineSpec {
    MachineSpec {
        memory_bytes: 128 << 20,
        vcpus: 2,
        cpu: CpuTemplate::Host,
        boot: Boot { kernel: FdIndex(0), initrd: None, cmdline: "console=ttyS0".into() },
        disks: vec![Disk {
            file: FdIndex(2),
            access: Access::ReadWrite,
            cache: CacheMode::Writeback,
            serial: "root".into(),
            limits: RateLimits::default(),
            backing: None,
        }],
        nics: vec![],
        balloon: Balloon::default(),
        console: Console { ring: FdIndex(1) },
        on_reset: OnReset::Rebuild,
    }
}

#[test]
fn a_sound_specification_passes_and_survives_json() {
    let spec = spec();
    spec.check(3).unwrap();
    let text = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<MachineSpec>(&text).unwrap(), spec);
}

// virtio 1.2: 5.1.4.1-2
#[test]
fn each_broken_field_is_named() {
    type Break = fn(&mut MachineSpec);
    type BreakNic = fn(&mut Nic);
    let nic = || Nic {
        tap: FdIndex(2),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        rx_limits: RateLimits::default(),
        tx_limits: RateLimits::default(),
    };
    let cases: [(&str, Break); 15] = [
        ("/memory_bytes", |s| s.memory_bytes = (128 << 20) + 1),
        ("/memory_bytes", |s| s.memory_bytes = u64::MAX),
        ("/vcpus", |s| s.vcpus = 0),
        ("/vcpus", |s| s.vcpus = 33),
        ("/boot/cmdline", |s| s.boot.cmdline = "x".repeat(2048)),
        ("/boot/cmdline", |s| s.boot.cmdline = "a\0b".into()),
        ("/balloon/target_bytes", |s| s.balloon.target_bytes = 128 << 20),
        ("/disks/0/serial", |s| s.disks[0].serial = "has space".into()),
        ("/disks/0/limits/bandwidth", |s| {
            s.disks[0].limits.bandwidth = Some(TokenBucket { per_second: 0, burst: 1 })
        }),
        ("/disks/0/file", |s| s.disks[0].file = FdIndex(3)),
        ("/disks/0/file", |s| s.disks[0].file = FdIndex(1)),
        ("/disks/0/backing", |s| s.disks[0].backing = Some(FdIndex(3))),
        ("/disks/0/backing", |s| s.disks[0].backing = Some(FdIndex(2))),
        ("/disks/0/backing", |s| {
            (s.disks[0].backing, s.disks[0].access) = (Some(FdIndex(1)), Access::ReadOnly)
        }),
        ("/disks", |s| s.disks = vec![s.disks[0].clone(); 17]),
    ];
    for (field, break_it) in cases {
        let mut broken = spec();
        break_it(&mut broken);
        assert_eq!(broken.check(3).unwrap_err().field, field);
    }
    let cases: [(&str, BreakNic); 8] = [
        ("/nics/0/mac", |nic| nic.mac = [0; 6]),
        ("/nics/0/mac", |nic| nic.mac[0] = 3),
        ("/nics/0/mtu", |nic| nic.mtu = 67),
        ("/nics/0/mtu", |nic| nic.mtu = 65522),
        ("/nics/0/rx_limits/operations", |nic| {
            nic.rx_limits.operations = Some(TokenBucket { per_second: 1, burst: 0 })
        }),
        ("/nics/0/tx_limits/bandwidth", |nic| {
            nic.tx_limits.bandwidth = Some(TokenBucket { per_second: 0, burst: 1 })
        }),
        ("/nics/0/tap", |nic| nic.tap = FdIndex(1)),
        ("/nics/0/tap", |nic| nic.tap = FdIndex(4)),
    ];
    for (field, break_it) in cases {
        let (mut broken, mut nic) = (spec(), nic());
        nic.tap = FdIndex(3);
        break_it(&mut nic);
        broken.nics = vec![nic];
        assert_eq!(broken.check(4).unwrap_err().field, field);
    }
    let mut broken = spec();
    broken.nics = (0..=limits::NICS_MAX).map(|_| nic()).collect();
    assert_eq!(broken.check(3).unwrap_err().field, "/nics");
}

#[test]
fn an_interface_that_says_no_mtu_has_that_of_ethernet() {
    let nic: Nic = serde_json::from_str(r#"{"tap": 2, "mac": [2, 0, 0, 0, 0, 1]}"#).unwrap();
    assert_eq!(nic.mtu, 1500);
}

#[test]
fn an_unknown_field_is_refused() {
    let mut value = serde_json::to_value(spec()).unwrap();
    value["turbo"] = true.into();
    assert!(serde_json::from_value::<MachineSpec>(value).is_err());
}
