use super::*;

fn space() -> ConfigSpace {
    let mut space = ConfigSpace::new(Identity {
        vendor: 0x1AF4,
        device: 0x1042,
        revision: 1,
        class: 0x01_80_00,
        subsystem_vendor: 0x1AF4,
        subsystem: 0x1100,
    });
    space.add_memory_bar(0x1_0000);
    space
}

#[test]
fn the_header_names_the_function() {
    let space = space();
    assert_eq!((space.dword(0), space.dword(8)), (0x1042_1AF4, 0x0180_0001));
    assert_eq!((space.dword(0x2C), space.dword(0x0C), space.dword(0x3C)), (0x1100_1AF4, 0, 0));
}

#[test]
fn a_bar_answers_its_size_and_keeps_what_is_written() {
    let mut space = space();
    space.write(0x10, &[0xFF; 4]);
    space.write(0x14, &[0xFF; 4]);
    assert_eq!((space.dword(0x10), space.dword(0x14)), (0xFFFF_0004, 0xFFFF_FFFF));
    space.write(0x10, &0xC003_1234_u32.to_le_bytes());
    space.write(0x14, &0_u32.to_le_bytes());
    assert_eq!(space.memory_bar(), None);
    space.write(0x04, &[2, 0]);
    assert_eq!(space.memory_bar(), Some(0xC003_0000));
    for other in (0x18..0x28).step_by(4).chain([0x30]) {
        space.write(other, &[0xFF; 4]);
        assert_eq!(space.dword(other), 0);
    }
}

#[test]
fn capabilities_form_a_list_and_only_their_masks_can_be_written() {
    let mut space = space();
    assert_eq!(space.word(6) & 0x10, 0);
    let first = space.add_capability(9, &[1, 2, 3], &[0xFF, 0x0F, 0]).unwrap();
    let second = space.add_capability(0x11, &[4; 10], &[]).unwrap();
    assert_eq!(space.word(6), 0x10);
    assert_eq!((space.word(0x34), first, second), (first, 0x40, 0x48));
    assert_eq!((space.word(first), space.word(second)), (u16::from(second as u8) << 8 | 9, 0x11));
    space.write(first, &[0xAA; 8]);
    assert_eq!((space.dword(first), space.dword(first + 4)), (u32::from_le_bytes([9, 0x48, 0xAA, 0x0A]), 3));
    assert_eq!(space.add_capability(9, &[0; 0xC0], &[]), None);
}

#[test]
fn accesses_at_the_end_and_beyond_are_harmless() {
    let mut space = space();
    for offset in [0xFC, 0xFF, 0x100, 0xFFF, u16::MAX] {
        space.write(offset, &[0xFF; 8]);
        let mut data = [0xAA; 8];
        space.read(offset, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
