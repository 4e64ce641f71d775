  python distill/DATM.py --cfg=configs/MiniFashion/ConvIN/IPC1.yaml \
      --dataset=ImageFolder --model=ConvNetW32 --zca=False --res=32 \
      --data_path=photos4 \
      --buffer_path=experts/photos4 --ipc=1 --factor=2 \
      --lr_teacher=0.001 --syn_steps=40 --expert_epochs=1 --min_start_epoch=0 \
      --max_start_epoch=9 --threshold=1.3 --epoch_eval_train=1000 \
      --lr_img=300.0 --lr_y=5.0
