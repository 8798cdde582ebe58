use std::io::Write;

use linux_loader::bootparam::{boot_params, setup_header};
use proptest::prelude::*;
use vm_memory::{ByteValued, Bytes};

use super::*;

const MIB: u64 = 1 << 20;

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// An ELF program of one segment at `address`, with a PVH note when `pvh` is an entry.
fn elf(address: u64, pvh: Option<u32>) -> Vec<u8> {
    let mut image = vec![0; 64];
    image[..20].copy_from_slice(&[0x7F, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 62, 0]);
    image[20] = 1;
    image[24..32].copy_from_slice(&address.to_le_bytes());
    image[32..40].copy_from_slice(&64u64.to_le_bytes());
    image[52..54].copy_from_slice(&64u16.to_le_bytes());
    image[54..56].copy_from_slice(&56u16.to_le_bytes());
    image[56..58].copy_from_slice(&(1 + u16::from(pvh.is_some())).to_le_bytes());
    let header = |kind: u32, offset: u64, address: u64, bytes: u64| {
        let words = [offset, address, address, bytes, bytes, 0];
        let mut header = [kind.to_le_bytes(), 7u32.to_le_bytes()].concat();
        header.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        header
    };
    image.extend(header(1, 256, address, 16));
    if let Some(entry) = pvh {
        image.extend(header(4, 272, 0, 20));
        image.resize(256, 0);
        image.extend([0x90; 16]);
        image.extend([4u32, 4, 18].iter().flat_map(|word| word.to_le_bytes()));
        image.extend(b"Xen\0");
        image.extend(entry.to_le_bytes());
    }
    image.resize(300, 0);
    image
}

/// A bzImage with one setup sector after the first and `kernel_bytes` of kernel.
fn bzimage(change: impl FnOnce(&mut setup_header), kernel_bytes: usize) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: 1,
        boot_flag: 0xAA55,
        header: 0x5372_6448,
        version: 0x20F,
        loadflags: 1,
        code32_start: 0x10_0000,
        initrd_addr_max: 0x7FFF_FFFF,
        kernel_alignment: 0x20_0000,
        relocatable_kernel: 1,
        xloadflags: 1,
        pref_address: 0x100_0000,
        init_size: 0x20_0000,
        ..Default::default()
    };
    change(&mut header);
    let page = boot_params { hdr: header, ..Default::default() };
    let mut image = page.as_slice()[..1024].to_vec();
    image[..0x1F1].fill(0);
    image.extend((0..kernel_bytes).map(|at| at as u8));
    image
}

fn boot(ram: &Ram, kernel: &[u8], initrd: Option<&[u8]>) -> Result<Start, Error> {
    let (kernel, initrd) = (file(kernel), initrd.map(file));
    prepare(ram, &Source { kernel: &kernel, initrd: initrd.as_ref(), cmdline: "a=b c", vcpus: 2 })
}

#[test]
fn an_elf_with_the_note_is_entered_by_pvh() {
    let ram = memory::new(64 * MIB).unwrap();
    let start = boot(&ram, &elf(0x20_0000, Some(0x20_0004)), Some(b"initrd")).unwrap();
    assert_eq!(start, Start::Pvh { entry: 0x20_0004, start_info: layout::START_INFO });
    assert_eq!(ram.read_obj::<u8>(GuestAddress(0x20_000F)).unwrap(), 0x90);

    let word = |at: u64| ram.read_obj::<u64>(GuestAddress(layout::START_INFO + at)).unwrap();
    assert_eq!(word(0), 0x1_336E_C578);
    assert_eq!((word(24), word(32), word(40)), (layout::CMDLINE, layout::ACPI_TABLES, layout::MEMORY_MAP));
    let mut cmdline = [0xFF; 6];
    ram.read_slice(&mut cmdline, GuestAddress(layout::CMDLINE)).unwrap();
    assert_eq!(&cmdline, b"a=b c\0");

    // mov dx, 0x602; mov al, 1; out dx, al
    let mut code = [0; 6];
    ram.read_slice(&mut code, GuestAddress(0xF_FFF0)).unwrap();
    assert_eq!(code, [0xBA, 0x02, 0x06, 0xB0, 0x01, 0xEE]);

    // One module, on the last whole page.
    assert_eq!(word(8) >> 32, 1);
    let module = word(16);
    let (at, bytes) = (
        ram.read_obj::<u64>(GuestAddress(module)).unwrap(),
        ram.read_obj::<u64>(GuestAddress(module + 8)).unwrap(),
    );
    assert_eq!((at, bytes), (64 * MIB - 4096, 6));
    let mut initrd = [0; 6];
    ram.read_slice(&mut initrd, GuestAddress(at)).unwrap();
    assert_eq!(&initrd, b"initrd");
}

#[test]
fn an_elf_without_the_note_is_entered_in_long_mode() {
    let ram = memory::new(64 * MIB).unwrap();
    match boot(&ram, &elf(0x20_0000, None), None).unwrap() {
        Start::Long { entry: 0x20_0000, zero_page, page_tables, .. } => {
            assert_eq!(zero_page, layout::ZERO_PAGE);
            // The first large page maps itself, and so does the last below 4 GiB.
            let second = ram.read_obj::<u64>(GuestAddress(page_tables)).unwrap() & !0xFFF;
            let third = |at: u64| ram.read_obj::<u64>(GuestAddress(second + at * 8)).unwrap() & !0xFFF;
            assert_eq!(ram.read_obj::<u64>(GuestAddress(third(0))).unwrap(), 0x83);
            assert_eq!(ram.read_obj::<u64>(GuestAddress(third(3) + 511 * 8)).unwrap(), 0xFFE0_0083);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_bzimage_is_entered_in_long_mode_with_its_header() {
    let ram = memory::new(64 * MIB).unwrap();
    let kernel = bzimage(|_| (), 3 << 20);
    let start = boot(&ram, &kernel, Some(&[7; 5000])).unwrap();
    assert!(matches!(start, Start::Long { entry: 0x10_0200, .. }), "{start:?}");
    let mut loaded = vec![0; 3 << 20];
    ram.read_slice(&mut loaded, GuestAddress(0x10_0000)).unwrap();
    assert!(loaded == kernel[1024..], "the whole kernel is there");
    let mut page = boot_params::default();
    ram.read_slice(page.as_mut_slice(), GuestAddress(layout::ZERO_PAGE)).unwrap();
    let (image, size, loader) = (page.hdr.ramdisk_image, page.hdr.ramdisk_size, page.hdr.type_of_loader);
    assert_eq!((u64::from(image), size, loader), (64 * MIB - 8192, 5000, 0xFF));
    let (rsdp, entries, alignment) = (page.acpi_rsdp_addr, page.e820_entries, page.hdr.kernel_alignment);
    assert_eq!((rsdp, entries, alignment), (layout::ACPI_TABLES, 4, 0x20_0000));
}

#[test]
fn the_memory_map_tells_ram_on_both_sides_of_the_hole_and_no_more() {
    let ram = memory::new((3 << 30) + 256 * MIB).unwrap();
    let map = memory_map(&ram);
    let usable: Vec<_> = map.iter().filter(|entry| entry.kind == MapKind::Usable).collect();
    let ranges: Vec<_> = usable.iter().map(|entry| (entry.start, entry.start + entry.bytes)).collect();
    assert_eq!(ranges, [(0, 0x9_FC00), (MIB, 3 << 30), (4 << 30, (4 << 30) + 256 * MIB)]);
    for pair in map.windows(2) {
        assert!(pair[0].start + pair[0].bytes <= pair[1].start, "{pair:x?}");
    }
}

#[test]
fn what_cannot_boot_is_refused_with_its_reason() {
    let ram = memory::new(64 * MIB).unwrap();
    let refusal = |kernel: &[u8], initrd: Option<&[u8]>| boot(&ram, kernel, initrd).unwrap_err();
    assert!(matches!(refusal(b"", None), Error::Short));
    assert!(matches!(refusal(b"MZ\x90\x00 and so on", None), Error::Format(_)));
    assert!(matches!(refusal(&elf(0x20_0000, None)[..70], None), Error::Load(_)));
    assert!(matches!(refusal(&elf(65 * MIB, None), None), Error::Load(_)));
    assert!(matches!(refusal(&elf(0x20_0000, Some(0x7000_0000)), None), Error::Entry(0x7000_0000)));
    assert!(matches!(refusal(&bzimage(|header| header.version = 0x206, 4096), None), Error::NotLong));
    assert!(matches!(refusal(&bzimage(|header| header.xloadflags = 0, 4096), None), Error::NotLong));
    let large = vec![0; 61 << 20];
    let error = refusal(&bzimage(|header| header.init_size = 0x300_0000, 4096), Some(&large));
    assert!(matches!(error, Error::InitrdTooLarge { .. }), "{error}");
    assert!(error.to_string().contains("67108864 bytes of memory"), "{error}");
}

#[test]
fn an_empty_initrd_is_none() {
    let ram = memory::new(64 * MIB).unwrap();
    boot(&ram, &elf(0x20_0000, Some(0x20_0000)), Some(b"")).unwrap();
    assert_eq!(ram.read_obj::<u32>(GuestAddress(layout::START_INFO + 12)).unwrap(), 0);
}

#[test]
fn a_kernel_shared_by_machines_keeps_its_position() {
    use std::io::{Seek, SeekFrom};
    let ram = memory::new(64 * MIB).unwrap();
    let mut kernel = file(&elf(0x20_0000, Some(0x20_0000)));
    kernel.seek(SeekFrom::Start(17)).unwrap();
    prepare(&ram, &Source { kernel: &kernel, initrd: None, cmdline: "", vcpus: 1 }).unwrap();
    assert_eq!(kernel.stream_position().unwrap(), 17);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_kernel_file_brings_the_vmm_down(
        pick in 0..3,
        flips in prop::collection::vec((0usize..1100, any::<u8>()), 0..12),
        length in 0usize..1200,
    ) {
        let mut image = match pick {
            0 => elf(0x20_0000, Some(0x20_0000)),
            1 => elf(0x20_0000, None),
            _ => bzimage(|_| (), 512),
        };
        for (at, value) in flips {
            if let Some(byte) = image.get_mut(at) {
                *byte = value;
            }
        }
        if length % 5 == 0 {
            image.truncate(length);
        }
        let ram = memory::new(32 * MIB).unwrap();
        let _ = boot(&ram, &image, Some(b"x"));
    }
}
